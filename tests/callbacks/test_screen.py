"""The first screen, as text."""

import io
from dataclasses import replace

import torch
from fake_run import report
from rich.console import Console as RichConsole
from torch import nn
from toys import ToyModel

from fasttrain.callbacks import screen
from fasttrain.core.data_report import DecodedSample, SourceReport
from fasttrain.core.kernel_plan import KernelPlan, KernelRow, KernelSite
from fasttrain.runtime.log import Output


def plain(lines):
    return "\n".join(line.plain for line in lines)


def test_the_data_section_says_what_was_read_and_what_came_of_it():
    assert plain(screen.data_section(report())) == (
        "data       chats.jsonl: conversations (column messages) · 1,180 of 1,200 rows used · "
        "20 dropped (12 empty, 8 nothing to learn) · 3 truncated\n"
        "           1,180 documents · 1.23M tokens, 48.6% supervised · 160 packs, 1.2% empty\n"
        "           held out: 40 documents · 41.0k tokens, 20.5k supervised\n"
        "           max_length 8192 (the model's limit is 131072, capped at 8192) · "
        "longest document 2048 · cache miss: ~/.cache/fasttrain/0a1b"
    )


def test_many_sources_are_summed_up():
    sources = tuple(SourceReport(f"{n}.jsonl", "text", rows=10, used=9) for n in range(7))
    text = plain(screen.data_section(report(sources=sources)))
    assert "3.jsonl" in text and "4.jsonl" not in text
    assert "and 3 more sources: 27 of 30 rows used" in text


def test_a_sample_without_colour_marks_what_is_supervised_and_escapes_control_characters():
    text = plain(screen.sample_section(report().sample, colour=False))
    assert text == (
        "sample     chats.jsonl, »supervised«\n"
        "           <user>↵Two and two?↵<answer>\n"
        "           »Four.\\x1b[2J<end>«"
    )


def test_a_sample_in_colour_highlights_the_supervised_span_alone():
    console = RichConsole(
        file=io.StringIO(), force_terminal=True, color_system="standard", width=200
    )
    Output(console).print(*screen.sample_section(report().sample, colour=True))
    shown = console.file.getvalue()
    assert "\x1b[30;42mFour.\\x1b[2J<end>\x1b[0m" in shown
    assert "\x1b[30;42m<user>" not in shown and "»" not in shown


def test_a_long_sample_is_cut_where_it_can_be_spared():
    pieces = tuple((f"{n} " + "x" * 1000 + " end", n % 2 == 1) for n in range(20))
    lines = screen.sample_section(DecodedSample("s", pieces), colour=False)
    assert len(lines) == 1 + screen.MAX_PIECES + 1
    assert "»1 xxx" in lines[2].plain and " end«" in lines[2].plain
    assert lines[-1].plain.strip() == "… 14 more pieces"
    assert max(len(line.plain) for line in lines) < 200


def test_the_model_section_counts_tied_parameters_once_and_names_the_trainable_share():
    model = ToyModel()
    model.head.weight = model.embedding.weight
    total = 11 * 4 + 4 + 4 + 11
    assert f"{total} parameters, all trainable" in plain(screen.model_section(model))
    for parameter in (model.embedding.weight, model.norm.weight):
        parameter.requires_grad = False
    assert "15 trainable (23.81%)" in plain(screen.model_section(model))


def test_every_optimizer_group_is_a_line():
    matrix, bias = nn.Parameter(torch.zeros(1000, 50)), nn.Parameter(torch.zeros(50))
    groups = [
        {"params": [matrix], "name": "matrices", "weight_decay": 0.1},
        {"params": [bias], "name": "vectors", "weight_decay": 0.0},
    ]
    text = plain(screen.optimizer_section(torch.optim.AdamW(groups, lr=3e-4)))
    assert text == (
        "optimizer  AdamW · matrices: 50.0k parameters in 1 tensor · weight decay 0.1 · "
        "peak lr 0.0003\n"
        "           AdamW · vectors: 50 parameters in 1 tensor · weight decay 0 · "
        "peak lr 0.0003"
    )


def test_of_many_optimizer_groups_the_rest_is_summed_up():
    groups = [
        {"params": [nn.Parameter(torch.zeros(10))], "name": f"matrices · layer {n}", "lr": n / 1000}
        for n in range(20, 0, -1)
    ]
    lines = screen.optimizer_section(torch.optim.SGD(groups))
    assert len(lines) == screen.MAX_GROUPS + 1
    assert "matrices · layer 20: 10 parameters" in lines[0].plain
    assert lines[-1].plain.strip() == "and 8 more groups: 80 parameters · peak lr 0.001 to 0.008"


def test_the_kernel_table_has_a_row_for_every_op():
    refused = (("triton", "no GPU"), ("flex", "no GPU"), ("sdpa", "slower: 3 ms"))
    site = KernelSite("norm", "rms_norm", "cpu", "first choice on cpu", refused, 0.2)
    left = KernelRow("rope", 0, 4, "eager", "left alone")
    assert plain(screen.kernel_section(KernelPlan((site,), (left,)))) == (
        "kernels    op        sites   chosen  why                  parity  rejected\n"
        "           rms_norm  1 of 1  cpu     first choice on cpu  0.20    "
        "triton, flex: no GPU; sdpa: slower: 3 ms\n"
        "           rope      0 of 4  eager   left alone           —       —\n"
        "           evaluation: the same kernels\n"
        "           generation: rms_norm; attention and logits are transformers' own"
    )
    timed = replace(site, milliseconds=1.234, eager_milliseconds=5.0, rejected=())
    assert plain(screen.kernel_section(KernelPlan((timed,), (left,)))).splitlines()[:2] == [
        "kernels    op        sites   chosen  why                  parity  ms (eager)  rejected",
        "           rms_norm  1 of 1  cpu     first choice on cpu  0.20    1.23 (5)    —",
    ]
    assert plain(screen.kernel_section(KernelPlan((replace(site, backend="eager"),)))).endswith(
        "evaluation and generation: the model as its authors wrote it, too"
    )


def test_notes_are_lined_up():
    assert plain(screen.plan_section([("engine", "local on CPU"), ("precision", "fp32")])) == (
        "plan       engine     local on CPU\n           precision  fp32"
    )
    assert screen.plan_section([]) == []


def test_text_from_the_data_cannot_move_the_cursor_or_style_the_screen():
    bad = SourceReport("a\x1b[31m.jsonl", "[bold]text[/bold] \u202e", rows=1, used=1)
    text = plain(screen.data_section(report(sources=(bad,))))
    assert "a\\x1b[31m.jsonl: [bold]text[/bold] \\u202e ·" in text
