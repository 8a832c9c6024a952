"""Find the statements in a source: asserts on losses, sweeps, words for numbers."""

import ast
import re
from collections.abc import Iterator

# Functions whose results depend on the model and on the steps.
TRAINED = frozenset({"train.train", "train.loss", "tuning.tune", "tuning.sweep"})
ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
MODULES = {"plots", "train", "tuning", "text", "np", "torch", "chapter", "spectra"}
RATES = {"lr", "rate"}
SENTENCE = re.compile(r"(?<=[.!?])[*\")]*\s+(?=[A-Z*`\"(\[{$])")
# Words that stand for a number; their sentence must give a number.
VAGUE = re.compile(
    r"\b(stays? close|nearly|almost|far (above|below|more|less)|hardly|close(ly)? to"
    r"|near (zero|one)|clearly (above|below)|level with|next to nothing)\b"
)
NUMBER = re.compile(
    r"\d|\{=|\b(zero|half|third|quarter|twice|\w*hundredth|\w*thousandth)\b"
    r"|\b(two|three|four|five|six|seven|eight|nine|ten|twelve|hundred|thousand)"
    r" (%|percent|times|nats|hundred|thousand|million|billion)"
)
# A number that an author typed and no cell fills in; and names with digits.
TYPED = re.compile(
    r"(?<![\w.{=])[-−]?\d[\d.,]*(?!\w|/\{=)"
    r"|\b(two|three|four|five|six|seven|eight|nine|ten|\w+ty|\w*hundred|\w*thousand)"
    r" (percent|times|nats|GB)\b"
)
NAMES = re.compile(
    r"\bL(lama|LaMA) \d(\.\d)?( \d+B)?|\b\d+[ -]bits?\b|\bsold as \d+ GB"
    r"|\b(rank|row|block|layer) \d+\b|\bn = \d+"
)
# Number words in the text of a figure: counts, shares, and "one" as a value.
COUNTS = (
    r"(two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|dozens?|\w+teen"
    r"|(twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)(-\w+)?"
    r"|hundreds?|thousands?)"
)
WORD = re.compile(
    rf"\b({COUNTS}|half (as|of|the)|twice|thrice"
    r"|(third|quarter|fifth|tenth|twentieth|hundredth|thousandth)s? of)\b"
    r"|\b(minus|at|to|from|by|between|above|below|left|around|than) one"
    r"(?=[.,;:]|$| (and|to|by|are|is)\b)",
    re.IGNORECASE,
)
# What a figure is made of, and what an experiment sets out with: these do not vary.
PARTS = (
    r"(panels?|bars?|lines?|curves?|rows?|columns?|points?|dots?|ticks?|crosses|slices"
    r"|areas?|boxes|colours|axes|adapters a block|thin matrices|codebooks|formats|kinds"
    r"|methods|mistakes|models|prompts|rates|runs|seeds|starts|ways|cards)"
)
COUNTED = re.compile(
    rf"\b((all|these|other) {COUNTS}\b(?! times)"
    rf"|{COUNTS}( (?!times)[\w'-]+){{0,2}} {PARTS}\b"
    rf"|({COUNTS} and )?{COUNTS} bits|powers? of two)\b",
    re.IGNORECASE,
)
NO_NUMBER = re.compile(r"`[^`]*`|\$[^$]*\$|\[[^]]*\]\([^)]*\)")  # code, formula, link


class Asserts(ast.NodeVisitor):
    """Find asserts that order results of training; follow names from line to line.

    A name depends on training while its last value used a name that does.
    """

    def __init__(self, source: str) -> None:
        self.names = set(TRAINED)
        self.found: dict[str, None] = {}
        self.visit(ast.parse(source))

    def visit_Assert(self, node: ast.Assert) -> None:
        """Note an assert with `<` or `>` on something from training."""
        orders = [n for n in ast.walk(node.test) if isinstance(n, ORDER)]
        if orders and self.uses(node.test):
            self.found[ast.unparse(node)] = None

    def visit_Assign(self, node: ast.Assign) -> None:
        """Note whether the assigned value depends on training."""
        for target in node.targets:
            self.bind(target, self.uses(node.value))

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """Keep the dependence of a in `a += x`."""
        if self.uses(node.value):
            self.bind(node.target, True)

    def visit_Call(self, node: ast.Call) -> None:
        """Let a depend on x in `a.append(x)`."""
        if isinstance(node.func, ast.Attribute) and any(map(self.uses, node.args)):
            self.names |= set(targets(node.func.value)) - MODULES

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Let a function depend on training if its body does."""
        self.bind(ast.Name(node.name), any(map(self.uses, node.body)))
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        """Follow the body twice: names at the end of one turn are used in the next."""
        self.bind(node.target, self.uses(node.iter))
        for statement in node.body * 2:
            self.visit(statement)

    def bind(self, target: ast.expr, trained: bool) -> None:
        """Note a name's new value; assigning to a part of a container adds to it."""
        if trained:
            self.names |= set(targets(target))
        elif isinstance(target, ast.Name):
            self.names.discard(target.id)

    def uses(self, node: ast.AST) -> bool:
        """Return whether a value depends on training."""
        shadows = {
            name
            for part in ast.walk(node)
            if isinstance(part, ast.comprehension) and not self.uses(part.iter)
            for name in targets(part.target)
        }
        return any(
            ast.unparse(part) in self.names - shadows
            for part in ast.walk(node)
            if isinstance(part, ast.Name | ast.Attribute)
        )


def targets(node: ast.AST) -> Iterator[str]:
    """Yield the names that an assignment to this target changes."""
    if isinstance(node, ast.Subscript | ast.Starred | ast.Attribute):
        yield from targets(node.value)
    elif isinstance(node, ast.Tuple | ast.List):
        for part in node.elts:
            yield from targets(part)
    elif isinstance(node, ast.Name):
        yield node.id


def sweeps(source: str) -> list[str]:
    """Return the loops over learning rates."""
    return [
        f"for {ast.unparse(node.target)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.For | ast.comprehension)
        and set(targets(node.target)) & RATES
    ]


def calls(source: str, method: str) -> list[ast.Call]:
    """Return the calls of a method of `chapter`."""
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"chapter.{method}"
    ]


def words(node: ast.expr | None) -> str:
    """Return a text as the source writes it; a value filled in counts as a number."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(words, node.values))
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.BinOp):
        return words(node.left) + words(node.right)
    return "" if node is None else "{="


def typed(text: str) -> list[str]:
    """Return the numbers in a text from `words` that no cell fills in."""
    return [found[0] for found in TYPED.finditer(NAMES.sub("", text))]


def worded(text: str) -> list[str]:
    """Return the number words in a figure's text that count no part of the figure."""
    return [found[0] for found in WORD.finditer(COUNTED.sub("", text))]


def vague(text: str) -> list[str]:
    """Return the sentences that use a word for a number and no number."""
    found = []
    for block in re.split(r"\n\s*\n|\n(?=- |\d+\. |\|)", text):
        for sentence in SENTENCE.split(" ".join(block.split())):
            bare = NO_NUMBER.sub(lambda m: "{=" if "{=" in m[0] else "", sentence)
            if VAGUE.search(bare) and not NUMBER.search(bare):
                found.append(sentence)
    return found
