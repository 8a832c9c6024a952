"""A small book for each test: a library, two data files, some chapters."""

import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "site" / "hooks"))

REFERENCE = '''
"""The thin change."""

LIMIT: int = 4


def merge(W, s):
    """Return the merged weight."""
    return W + s
'''
TORCH = '''
"""The thin change, as a module."""
import functools


class LoRALinear:
    """A layer."""

    @functools.cache
    def forward(self, x):
        """Apply it."""
        return x
'''
CUDA = """
// Not this one: __global__ void ghost(int x) { a brace in a comment
__device__ int helper(int x) { return x; }

// Adds s to each weight.
template <class T>
__global__ void __launch_bounds__(256)
merge(T* W, T s) {
  if (W) { W[0] += s; }  // }
  const char* brace = "}";
}
"""
BIBLIOGRAPHY = """
hu2021:
  authors: ["Hu, Edward J.", "Shen, Yelong", "Wallis, Phillip"]
  year: 2021
  title: LoRA
  venue: ICLR
  url: https://example.org/lora
"""
GLOSSARY = """
rank:
  short: The inner width.
  text: ""
"""
# The parts of minipeft.lab.chapter that the book's generator needs, without imports.
LAB = """
import sys, types, pathlib
lab = types.ModuleType("minipeft.lab.chapter")
lab.FIGURES = []
sys.modules["minipeft.lab.chapter"] = lab
OUT = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
def show(name, alt, caption=""):
    path = OUT / f"{name}.svg"
    path.write_text('<svg width="72pt" height="36pt"><g fill="#24292f"/></svg>')
    lab.FIGURES.append((path, alt, caption))
"""


class SmallBook:
    """A repository in a temporary folder."""

    def __init__(self, root: Path):
        from book import Folders

        self.layout = Folders(root)
        self.lines: list[str] = []
        files = {
            "minipeft/__init__.py": '"""Small."""',
            "minipeft/reference/lora.py": REFERENCE,
            "minipeft/torch/lora.py": TORCH,
            "minipeft/kernels/lora.cu": CUDA,
            "site/bibliography.yml": BIBLIOGRAPHY,
            "site/glossary.yml": GLOSSARY,
        }
        for name, text in files.items():
            self.write(name, text.lstrip())

    def write(self, name: str, text: str) -> Path:
        path = self.layout.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def chapter(self, text: str, name: str = "01_lora") -> Path:
        text = textwrap.dedent(text).lstrip()
        if "[markdown]\n# # " not in text:
            text = f"# %% [markdown]\n# # A title\n\n{text}"
        return self.write(f"chapters/{name}.py", text)

    def build(self):
        from generate import generate

        return generate(self.layout, self.lines.append)

    def page(self, name: str = "01_lora") -> str:
        return (self.layout.docs / "book" / f"{name}.md").read_text()


@pytest.fixture
def small(tmp_path: Path) -> SmallBook:
    return SmallBook(tmp_path)


@pytest.fixture
def lab() -> str:
    """The code that stands in for minipeft.lab, to put first in a chapter."""
    return "# %%" + LAB


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT
