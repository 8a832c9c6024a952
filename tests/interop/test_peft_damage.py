"""Damaged and foreign folders: one sentence each, and nothing is loaded."""

import dataclasses
import json
import random
import shutil

import pytest
import safetensors.torch
import torch

from minipeft import cli
from minipeft.errors import InputError
from minipeft.interop import peft_folder, peft_model, peft_settings
from minipeft.torch import inject
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.vera import VeRAConfig
from tests.agreement.llama import llama
from tests.interop import peers

TARGETS = ["q_proj", "v_proj"]
METHODS = {
    "LoRA": LoRAConfig(r=2, alpha=3),
    "DoRA": DoRAConfig(r=2, alpha=3),
    "VeRA": VeRAConfig(r=4),
    "IA3": IA3Config(),
    "prompt": PromptConfig(3),
    "prefix": PrefixConfig(3),
}
EACH = 90
"""Damaged folders of each method; 540 in all."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for method, config in METHODS.items():
        if method == "prompt":
            model = PromptModel(llama(), config)
        elif method == "prefix":
            model = PrefixModel(llama(), config)
        else:
            model = inject.inject(llama(), config, TARGETS)
        found[method] = tmp_path_factory.mktemp("sound") / method
        peft_model.save(model, found[method])
    return found


def truncated(folder, draw):
    path = folder / draw.choice([peft_folder.CONFIG, peft_folder.WEIGHTS])
    data = path.read_bytes()
    # The last character is a newline; without it the file is still correct.
    path.write_bytes(data[: draw.randrange(len(data) - 2)])


def longer(folder, draw):
    path = folder / peft_folder.WEIGHTS
    path.write_bytes(path.read_bytes() + bytes(draw.randrange(1, 9)))


def broken_header(folder, draw):
    path = folder / peft_folder.WEIGHTS
    data = bytearray(path.read_bytes())
    data[draw.randrange(8)] ^= 1 << draw.randrange(8)  # the length of the header
    path.write_bytes(data)


def broken_text(folder, draw):
    path = folder / peft_folder.CONFIG
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data) - 1)] = 0xFF  # a byte that UTF-8 never uses
    path.write_bytes(data)


def key_twice(folder, draw):
    path = folder / peft_folder.CONFIG
    fields = json.loads(path.read_text())
    name = draw.choice(sorted(fields))
    entry = f"{json.dumps(name)}: {json.dumps(fields[name])}"
    path.write_text("{" + entry + ", " + path.read_text().strip()[1:])


def tensor_twice(folder, draw):
    path = folder / peft_folder.WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = draw.choice([n for n in header if n != "__metadata__"])
    entry = f"{json.dumps(name)}:{json.dumps(header[name])},"
    text = b"{" + entry.encode() + data[9 : 8 + length]
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def rewritten(folder, change):
    contents = peft_folder.read(folder)
    tensors = dict(contents.tensors)
    changed = change(tensors)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / peft_folder.CONFIG).write_text(json.dumps(contents.config))
    path = folder / peft_folder.WEIGHTS
    metadata = {k: v for k, v in contents.metadata.items() if k != peft_folder.SUM}
    safetensors.torch.save_file(changed, path, metadata=metadata)


def not_finite(folder, draw):
    def change(tensors):
        name = draw.choice(sorted(tensors))
        spoilt = tensors[name].clone()
        flat = spoilt.view(-1)
        bad = draw.choice([float("nan"), float("inf"), -float("inf")])
        flat[draw.randrange(len(flat))] = bad
        return {**tensors, name: spoilt}

    rewritten(folder, change)


def lost_tensor(folder, draw):
    def change(tensors):
        name = draw.choice(sorted(tensors))
        return {n: t for n, t in tensors.items() if n != name}

    rewritten(folder, change)


def foreign_tensor(folder, draw):
    names = ["../../etc/passwd", "/root/x.lora_A.weight", "base_model.model.x", "x", ""]
    name = draw.choice(names) + str(draw.randrange(9))
    rewritten(folder, lambda tensors: {**tensors, name: torch.ones(2, 2)})


def other_shape(folder, draw):
    def change(tensors):
        name = draw.choice(sorted(tensors))
        old = tensors[name]
        new = draw.choice([torch.ones(()), torch.ones(1), torch.ones(*old.shape, 1)])
        return {**tensors, name: draw.choice([new, torch.cat([old, old])])}

    rewritten(folder, change)


def whole_numbers(folder, draw):
    def change(tensors):
        name = draw.choice(sorted(tensors))
        return {**tensors, name: torch.ones(tensors[name].shape, dtype=torch.int32)}

    rewritten(folder, change)


def renamed(folder, draw):
    def change(tensors):
        name = draw.choice(sorted(tensors))
        return {(n + "." if n == name else n): t for n, t in tensors.items()}

    rewritten(folder, change)


NEEDED = {
    "LORA": ["peft_type", "r", "lora_alpha"],
    "VERA": ["peft_type", "r", "projection_prng_key"],
    "IA3": ["peft_type"],
    "PROMPT_TUNING": ["peft_type", "num_virtual_tokens"],
    "PREFIX_TUNING": ["peft_type", "num_virtual_tokens"],
}
STRANGE = ["8", "a/../b", -1, 0, 10**400, [], {}, None, True, [1], {"a": 1}, 1.5, [[]]]


def odd_setting(folder, draw):
    path = folder / peft_folder.CONFIG
    fields = json.loads(path.read_text())
    name = draw.choice(NEEDED[fields["peft_type"]])
    allowed = {"lora_alpha": [-1, 0, 1.5], "projection_prng_key": [0]}
    values = [
        v
        for v in STRANGE
        if type(v) is bool or not any(v == a for a in allowed.get(name, []))
    ]
    fields[name] = draw.choice(values)
    path.write_text(json.dumps(fields))


def odd_json(folder, draw):
    texts = ["", "[]", "3", "null", "{" * 10**5, "[" * 10**5, '{"r": NaN}', "\x00"]
    texts += ['{"r": Infinity}', '{"r": 1' + "0" * 5000 + "}", '"{}"', "{'r': 1}"]
    (folder / peft_folder.CONFIG).write_text(draw.choice(texts))


def absent(folder, draw):
    path = folder / draw.choice([peft_folder.CONFIG, peft_folder.WEIGHTS])
    path.unlink()
    kind = draw.randrange(4)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to("/nowhere/at/all")
    elif kind == 3:
        path.symlink_to(path)


def pickled(folder, draw):
    (folder / peft_folder.WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


def oversized(folder, draw):
    path, most = draw.choice(
        [
            (folder / peft_folder.CONFIG, peft_folder.LARGEST_CONFIG),
            (folder / peft_folder.WEIGHTS, peft_folder.LARGEST_WEIGHTS),
        ]
    )
    with path.open("r+b") as file:
        file.truncate(most + 1)  # a sparse file: no bytes are written


DAMAGES = [
    truncated,
    longer,
    broken_header,
    broken_text,
    key_twice,
    tensor_twice,
    not_finite,
    lost_tensor,
    foreign_tensor,
    other_shape,
    whole_numbers,
    renamed,
    odd_setting,
    odd_json,
    absent,
    pickled,
    oversized,
]


def refusal_of(model, folder, damage):
    try:
        peft_model.load(model, folder, say=lambda line: None)
    except InputError as error:
        return str(error)
    pytest.fail(f"{damage} was loaded")


@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_folder_is_refused_in_one_sentence(method, folders, tmp_path):
    model = llama()
    draw = random.Random(method)
    names = [name for name, _ in model.named_modules()]
    values = {n: t.clone() for n, t in model.state_dict().items()}
    for i in range(EACH):
        damage = DAMAGES[i % len(DAMAGES)]
        folder = tmp_path / str(i)
        shutil.copytree(folders[method], folder)
        damage(folder, draw)
        sentence = refusal_of(model, folder, f"{damage.__name__} {i}")
        assert "\n" not in sentence, (damage.__name__, sentence)
        assert 20 < len(sentence) < 600, (damage.__name__, sentence)
        assert [name for name, _ in model.named_modules()] == names, damage.__name__
        assert all(p.requires_grad for p in model.parameters()), damage.__name__
        shutil.rmtree(folder, ignore_errors=True)
    assert all(torch.equal(values[n], t) for n, t in model.state_dict().items())
    said = []
    peft_model.load(llama(), folders[method], say=said.append)  # an undamaged one loads
    assert "is the one" in said[0]


@pytest.mark.parametrize(
    ("key", "odd", "nearest"),
    [
        ("inference_mode", "ioference_mode", "inference_mode"),
        ("use_rslora", "use_rs_lora", "use_rslora"),
        # Settings of peft's own; the second where somebody left use_dora out.
        ("peft_version", "use_bdlora", None),
        ("use_dora", "use_bdlora", None),
        ("use_rslora", "use_qalora", None),
    ],
)
def test_a_setting_whose_name_is_damaged_is_not_taken_for_a_method(
    folders, tmp_path, key, odd, nearest
):
    folder = shutil.copytree(folders["LoRA"], tmp_path / "a")
    path = folder / peft_folder.CONFIG
    config = json.loads(path.read_text())
    config = {odd if name == key else name: value for name, value in config.items()}
    path.write_text(json.dumps({**config, odd: True}))
    with pytest.raises(InputError) as refused:
        peft_model.load(llama(), folder)
    assert f"{odd} = True, " in str(refused.value)
    remedy = (
        f"a name that minipeft does not know, and no {nearest}, which is nearest to "
        f"it; get the file again, or, if {odd} is what was meant, merge it with the "
        "library that trained it"
        if nearest
        else "for which minipeft has no method; merge it with the library that "
        "trained it"
    )
    assert str(refused.value).endswith(remedy)


def test_every_setting_of_peft_is_read_or_listed():
    lora = pytest.importorskip("peft").LoraConfig
    read = f"{peft_settings.COMMON} {peft_settings.FIELDS['LORA']}".split()
    theirs = {field.name for field in dataclasses.fields(lora)}
    assert theirs - {*read} <= peft_settings.THEIRS


def test_a_crash_while_writing_leaves_nothing(tmp_path, monkeypatch):
    contents = peft_model.contents_of(inject.inject(llama(), METHODS["LoRA"], TARGETS))
    for place in ("mkdir", "rename", "write_text", "chmod"):
        with monkeypatch.context() as patch:

            def full(*args, **settings):
                raise OSError(28, "No space left on device")

            patch.setattr(peft_folder.Path, place, full)
            with pytest.raises(InputError, match="No space left"):
                peft_folder.write(tmp_path / "adapter", contents)
        assert list(tmp_path.iterdir()) == []
    peft_folder.write(tmp_path / "adapter", contents)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        peft_folder.CONFIG,
        peft_folder.WEIGHTS,
    ]


def test_what_is_not_finite_is_not_written(tmp_path):
    model = inject.inject(llama(), METHODS["LoRA"], TARGETS)
    with torch.no_grad():
        inject.trainable_parameters(model)[0][0, 0] = float("nan")
    with pytest.raises(InputError, match="is not finite"):
        peft_model.save(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


FLIPS = 60
"""Bits of the header, and of the data, that are flipped in each method's weights."""


def attempt(folder):
    """Return the contents, or None and the refusal."""
    try:
        return peft_folder.read(folder), ""
    except InputError as error:
        return None, str(error)


@pytest.mark.parametrize("method", METHODS)
def test_a_flipped_bit_of_the_weights_changes_nothing_in_silence(
    method, folders, tmp_path
):
    draw = random.Random(method)
    folder = tmp_path / "flipped"
    shutil.copytree(folders[method], folder)
    path, sound = folder / peft_folder.WEIGHTS, peft_folder.read(folder)
    data, loaded = path.read_bytes(), 0
    start = 8 + int.from_bytes(data[:8], "little")
    key = data.index(peft_folder.SUM.encode())
    places = draw.sample(range(8, start), FLIPS)
    places += [draw.randrange(start, len(data)) for _ in range(FLIPS)]
    for place in [*places, key, key + 3]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        found, said = attempt(folder)
        assert "\n" not in said
        assert (found is None) == ("damaged" in said)
        if found is None:
            continue
        loaded += 1
        assert key <= place < key + len(peft_folder.SUM)  # it has no checksum now
        for name, tensor in sound.tensors.items():
            assert torch.equal(found.tensors[name], tensor)
    assert loaded
    path.write_bytes(data)
    assert peft_folder.read(folder).metadata == sound.metadata


def test_peft_and_safetensors_read_the_file_and_inspect_tells_of_the_checksum(
    folders, tmp_path, capsys
):
    folder, plain = folders["LoRA"], tmp_path / "plain"
    sound = peft_folder.read(folder)
    mine = safetensors.torch.load_file(folder / peft_folder.WEIGHTS)
    with peers.quiet():
        theirs = pytest.importorskip("peft").PeftModel.from_pretrained(llama(), folder)
        theirs.save_pretrained(plain)
    again = peft_folder.read(plain)
    assert peft_folder.SUM in sound.metadata
    assert peft_folder.SUM not in again.metadata
    assert sound.tensors.keys() == mine.keys() == again.tensors.keys()
    for name, tensor in sound.tensors.items():
        assert torch.equal(mine[name], tensor)
        assert torch.equal(again.tensors[name], tensor)
    fixed = tmp_path / "fixed"
    intact = "checksum: the tensors and minipeft's metadata are as minipeft wrote them"
    for place, said in (
        (folder, intact),
        (plain, "checksum: none in the file, so a damaged number is not noticed"),
        (fixed, intact),
    ):
        more = ["--fix", str(fixed)] if place == folder else []
        assert cli.main(["inspect", str(place), *more]) == 0
        assert said in capsys.readouterr().out.splitlines()
    data = bytearray((fixed / peft_folder.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (fixed / peft_folder.WEIGHTS).write_bytes(data)
    assert cli.main(["inspect", str(fixed)]) == 2
    assert "its checksum is another one; get the file again" in capsys.readouterr().err


def test_a_note_in_the_metadata_is_no_damage_and_another_dtype_is_a_change(
    folders, tmp_path
):
    folder = shutil.copytree(folders["LoRA"], tmp_path / "a")
    sound, path = peft_folder.read(folder), folder / peft_folder.WEIGHTS

    def write(tensors, metadata):
        safetensors.torch.save_file(tensors, path, metadata=metadata)
        return attempt(folder)

    noted = {**sound.metadata, "note": "mine", "author": "somebody"}
    found, said = write(dict(sound.tensors), noted)
    assert not said
    assert found.metadata == noted
    assert write(dict(sound.tensors), {**noted, "note": "another"})[1] == ""
    for key in {*sound.metadata} - {peft_folder.SUM}:
        other = {**noted, key: noted[key] + " "}
        less = {name: text for name, text in noted.items() if name != key}
        for metadata in (other, less):
            assert (
                "its checksum is another one" in write(dict(sound.tensors), metadata)[1]
            )
    half = {name: tensor.half() for name, tensor in sound.tensors.items()}
    said = write(half, noted)[1]
    assert "was changed since minipeft wrote it" in said
    assert f"remove the key {peft_folder.SUM} from its metadata, or change" in said
    del noted[peft_folder.SUM]  # the remedies
    assert write(half, noted)[1] == ""
    model = peft_model.load(llama(), folders["LoRA"], say=lambda line: None)
    for adapter in inject.trainable_parameters(model):
        adapter.data = adapter.data.half()
    peft_model.save(model, tmp_path / "half")
    again = peft_folder.read(tmp_path / "half")
    assert all(torch.equal(again.tensors[name], half[name]) for name in half)
    assert peft_folder.SUM in again.metadata
