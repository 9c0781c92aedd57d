"""y = 2 x"""


def unsupported(problem):
    return None


def forward(x):
    return 2 * x


def backward(dy):
    return 2 * dy
