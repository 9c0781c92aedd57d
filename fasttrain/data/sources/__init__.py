"""Where rows come from. A source returns a `datasets.Dataset` of the rows as they are.

Three columns have a meaning of their own, and none of them is ever training text:
`group` keeps rows together when held-out rows are drawn; `_origin` says where a row was read, such
as `train.jsonl:17`; `_problem` holds what is wrong with a row that could not be read, so that the
policy `data.invalid` decides about it.
"""

GROUP = "group"
ORIGIN = "_origin"
PROBLEM = "_problem"
RESERVED = (GROUP, ORIGIN, PROBLEM)
