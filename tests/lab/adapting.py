"""Every method of the formulas on a real model, as the formulas name it."""

from minipeft.lab.memory import LINEARS
from minipeft.torch.bottleneck import BottleneckConfig
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.hira import HiRAConfig
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.inject import inject
from minipeft.torch.loftq import LoftQConfig
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.miss import MiSSConfig
from minipeft.torch.pissa import PiSSAConfig
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.qlora import quantize_linears
from minipeft.torch.vera import VeRAConfig

R, TOKENS = 8, 10
CONFIGS = {
    "lora": LoRAConfig(R, 16),
    "rslora": LoRAConfig(R, 16, rank_stabilized=True),
    "qlora": LoRAConfig(R, 16),
    "dora": DoRAConfig(R, 16),
    "pissa": PiSSAConfig(R, 16),
    "loftq": LoftQConfig(R, 16, steps=1),
    "hira": HiRAConfig(R),
    "miss": MiSSConfig(R),
    "vera": VeRAConfig(R),
    "ia3": IA3Config(("down_proj",)),
    "bottleneck": BottleneckConfig(R),
}
PLACES = {
    "ia3": ("k_proj", "v_proj", "down_proj"),
    "bottleneck": ("o_proj", "down_proj"),
}
NAMES = ("full", *CONFIGS, "prefix", "prompt")


def prepared(model, name):
    """Return the model ready to train by this method; changed in place."""
    if name == "full":
        return model.requires_grad_(True)
    if name == "prefix":
        return PrefixModel(model, PrefixConfig(TOKENS))
    if name == "prompt":
        return PromptModel(model, PromptConfig(TOKENS))
    if name == "qlora":
        quantize_linears(model)
    return inject(model, CONFIGS[name], PLACES.get(name, LINEARS))


def rank(name):
    """Return the r of the formulas."""
    return TOKENS if name in ("prefix", "prompt") else R
