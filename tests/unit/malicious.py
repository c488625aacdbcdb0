"""Answers meant to hurt a judge: nesting, megabytes, huge powers, LaTeX and Python injection, every script."""

import random
from collections.abc import Iterator

_TEXT = (
    r"\frac \sqrt \boxed \left \right \begin{pmatrix} \end{pmatrix} \text \input{/etc/passwd} \include{x} \write18{ls} "
    r"\def\a{\a\a}\a \sum_{n=1}^{10^9} \int_0^1 \prod \lim \pm \cup \in \{ \} \\ & $ $$ \( \) \[ \] { } ( ) [ ] ^ _ ^^ "
    r"** ! % , ; : = < > \leq \geq \neq + - * / . 0 1 9 99999 1e999999 x y z A B C D and or is the answer 答案 选 π ∞ ° ± "
    r"\times10^ 9^9^9^9 __import__('os').system('x') eval(1) lambda:0 NaN inf"
)
_WORDS = [*_TEXT.split(), "\x00", "\u202e", "\ud800"]

_FIXED = [
    "9^{9^{9^{9}}}", "9**9**9**9", "10^{10^{10^{10}}}", "((((((10^10)^10)^10)^10)^10)^10)", "2^{2^{2^{2^{2^{2}}}}}",
    "999999999!", "((100!)!)!", "\\sum_{n=1}^{10^{9}} n", "\\int_0^1 \\int_0^1 x^{x^{x}} dx", "x^{999999999}",
    "(x+y)^{9999}", "(1+x)^{500}(1-x)^{500}", "\\prod_{i=1}^{1000000} i", "1/0", "0^0", "\\sqrt[0]{1}", "\\log_0 0",
    "\\tan(10^{100})", "1e999999999", "0." + "1" * 5000, "1" * 10000, "-" * 5000 + "1", "+" * 3000,
    "(" * 3000 + "1" + ")" * 3000, "{" * 5000, "\\frac{" * 1000 + "1", "\\sqrt" * 500 + "2",
    "\\sqrt{" * 500 + "2" + "}" * 500, "\\boxed{" * 2000, "\\boxed{" * 200 + "1" + "}" * 200, "$" * 20000, "$ " * 10000,
    "\\(" * 5000, "a" * 100000, "a " * 50000, "A, " * 5000, "answer is " * 5000, "is " * 20000 + "3",
    "final answer " * 3000, "<answer>" * 5000, "</answer>" * 5000, "<think>" * 5000, "x" * 1000000, "1 " * 100000,
    "1," * 50000, "{,}" * 20000, "\\text{" * 3000, "\\left(" * 3000, "^" * 5000, "1^" * 400 + "1", "x_" * 400 + "1",
    "^{\\circ}" * 3000, " " * 1000000 + "1", "\n" * 100000 + "1", "\x00" * 1000 + "12", "\ud800", "😀" * 10000,
    "__import__('os').system('touch /nonexistent/pwned')", "\\input{/etc/passwd}", "{{config}}", "${jndi:ldap://x}",
    "%s%s%s%n", "\\begin{pmatrix}" * 300, "\\begin{pmatrix}" + "1&" * 500 + "1\\end{pmatrix}", "1" + "+1" * 5000,
    "|" * 1000, "|x" * 200, "\\pm" * 50 + "1", "1\\pm" * 20 + "1", "(1," * 500 + "2" + ")" * 500, "\\{" * 500,
    "[1,2)\\cup" * 500 + "(3,4)", "x<" * 500 + "1", "=" * 5000, "1=" * 2000 + "1", "a=b=" * 500, "1:" * 2000 + "1",
    "\\sin " * 300 + "x", "\\log_{" * 100 + "2", "e^{" * 60 + "x" + "}" * 60, "\\vec{" * 100, "\\angle" * 500,
    "and " * 5000, "12 cm" + "^2" * 500, "square " * 500 + "m", "per " * 2000, "(" * 28 + "x+1" + ")^9" * 28,
    "\\cos(\\cos(" * 20 + "x" + "))" * 20, "\\binom{10^9}{5}", "(x^{100}+y^{100}+z^{100})^{100}",
    "\\sqrt{x+" * 20 + "1" + "}" * 20, "\\frac{x^{97}-1}{x-1}-\\frac{y^{89}-1}{y-1}", "f(f(f(f(x))))", "\\max(1,2)",
    "\\arcsin(2)", "\\Gamma(10^5)", "\\zeta(3)", "i^i^i", "\\overline{" * 50, "[" * 6, "((((((((((x))))))))))",
]  # fmt: skip
_SHELLS = ("{}", "${}$", "\\boxed{{{}}}", "The answer is {}", "\\({}\\)", "x={}")
_SCRIPTS = (
    (0x400, 0x4FF), (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x3040, 0x30FF), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3), (0x1F300, 0x1F9FF), (0x2200, 0x22FF), (0xFF00, 0xFFEF), (0x300, 0x36F), (0x2000, 0x206F), (0, 0x1F),
)  # fmt: skip
_GOLDS = (
    "12", "A", "ACD", r"\frac{1}{2}", "x>3", "(1,2)", "isosceles triangle", "12 cm", "x^2+2x+1", "y=2x+1", r"\{1,2\}",
    r"\begin{pmatrix}1\\2\end{pmatrix}", r"\pm 3", "增加", r"\sin 2x", "9^{9^{9}}", "f(x)=x^2", r"\vec{a}-\vec{b}",
)  # fmt: skip


def pairs(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(response, gold) pairs; sometimes the gold is the nasty text itself."""
    random_ = random.Random(seed)
    nasty = [shell.format(text) if shell != "{}" else text for shell in _SHELLS for text in _FIXED]
    for index in range(count):
        if index < len(nasty):
            body = nasty[index]
        elif index % 4 == 0:
            body = "".join(random_.choice(_WORDS) + random_.choice(("", " ")) for _ in range(random_.randint(1, 60)))
        elif index % 4 == 1:
            low, high = random_.choice(_SCRIPTS)
            body = "".join(chr(random_.randint(low, high)) for _ in range(random_.randint(1, 200)))
        elif index % 4 == 2:
            body = random_.choice(_WORDS) * random_.randint(1, 300)
        else:
            body = "$" + "".join(random_.choice(_WORDS) for _ in range(random_.randint(1, 25))) + "$"
        response = body if random_.random() < 0.1 else f"<think>t</think><answer>{body}</answer>"
        yield response, random_.choice(_GOLDS) if random_.random() < 0.85 else body[:2000]
