"""A run on an accelerator: what the towers make of it, and where the time of DMC-OT goes.

    python benchmarks/accelerator.py [--size full|quick|tiny] [--out FILE] [--into docs/speed.md]

The towers are ViT-B/16 of random weights (times do not depend on weights), in float32 and in bfloat16. Passes are of one
batch that lies on the device, and of as many class texts. A prompt step is one of stage 2 with prompts of all classes (100 in 10
tasks), its launches the device's kernels; then the same captured as CUDA graphs (`stage2.cuda_graph`). Stage 1 trains LoRA with its
usual settings on the same batch. Its share of the peak is the arithmetic of its products (counted, attention included, forward and
backward) per second, over that of one large product in the same precision, measured by turns with it.

Test images behind frozen blocks are one batch, LoRA being on a quarter of the blocks, the last: the whole tower, and what follows the
trunk.

Draws are those of an epoch of stage 2, unit rows of full covariances on the device: made on the processor and copied, or made there
of copied random numbers.

DMC-OT is a whole run with its evaluations, in bfloat16, over images of noise, 32 x 32, that lie in memory and are enlarged
for the tower; on an accelerator again with steps of stage 2 captured. A part lasts until the device is done with it. Waiting is inside
the parts that ask for images.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from launches import grown, text_step
from measure import bytes_cell, handed_out, in_turns, launches, machine_line, seconds_cell, surroundings
from standins import old_classes, vit_b
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cairn.config import with_settings
from cairn.data.images import Dataset
from cairn.data.loading import Loader
from cairn.data.stream import task_stream
from cairn.errors import counted
from cairn.experiment.evaluator import Evaluator
from cairn.maths.losses import class_cross_entropy
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.methods import dmc_ot
from cairn.methods.catalogue import METHODS
from cairn.methods.parts.stages import VisionStage, align_vision
from cairn.methods.parts.two_stage import TwoStageState
from cairn.towers.catalogue import load_towers
from cairn.towers.clip import ClipTowers
from cairn.towers.prompts import Prompts
from cairn.towers.tuning import ImageEncoder, Lora
from cairn.training.context import Context, Log
from cairn.training.seeds import Seeds

SIZES = {
    "full": {"device": "cuda", "tower": "ViT-B/16", "batch": 128, "steps": 20, "repeats": 3, "product": 8192, "prompted": 100,
             "images": 10_000, "classes": 40, "tasks": 4},
    "quick": {"device": "cuda", "tower": "ViT-B/16", "batch": 128, "steps": 5, "repeats": 1, "product": 8192, "prompted": 100,
              "images": 2000, "classes": 20, "tasks": 2},
    "tiny": {"device": "cpu", "tower": "tiny", "batch": 4, "steps": 1, "repeats": 1, "product": 64, "prompted": 4,
             "images": 24, "classes": 4, "tasks": 2},
}  # fmt: skip
"""`tiny` runs on the processor: it is there for the test."""

PRECISIONS = ("float32", "bfloat16")
PRODUCTS = 10
"""Large products that are timed at once."""


class RandomImages:
    """Images of noise, 32 x 32, in memory."""

    def __init__(self, number: int, classes: int, seed: int):
        self.values = np.random.default_rng(seed).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
        self.labels = np.arange(number, dtype=np.int64) % classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[index]

    def describe(self, index: int) -> str:
        return f"noise {index}"


class OneBatch:
    """The same batch, so many times an epoch, in place of a loader."""

    def __init__(self, pixels: Tensor, labels: Tensor, steps: int):
        self.pixels, self.labels, self.steps = pixels, labels, steps

    def __len__(self) -> int:
        return self.steps

    def epochs(self, rngs: Sequence[torch.Generator], skip: int = 0) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        return (iter([(self.pixels, self.labels)] * self.steps) for _ in rngs)


def random_towers(tower: str, device: torch.device) -> dict[str, ClipTowers]:
    """The same weights on the device in each precision."""
    own = load_towers("tiny", device="cpu") if tower == "tiny" else vit_b(16)
    return {
        precision: ClipTowers(
            own._model, own.tokenizer, own.preprocessing, name=own.name, device=str(device), precision=precision
        )
        for precision in PRECISIONS
    }


def settled(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def operations(encoder: ImageEncoder, pixels: Tensor) -> float:
    """Floating point operations in the products of one image's forward and backward pass."""
    # Of all ways to compute attention, the one by plain products is counted everywhere
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(pixels).sum().backward()
    return counter.get_total_flops() / len(pixels)


def has_flash(towers: ClipTowers, pixels: Tensor) -> bool:
    """Whether a pass can be made with flash attention alone, which is then what it is made with."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        try:
            towers.image(pixels)
        except RuntimeError:
            return False
    return True


def tower_speed(
    towers: dict[str, ClipTowers],
    device: torch.device,
    *,
    batch: int,
    steps: int,
    repeats: int,
    product: int,
    classes: int,
) -> list[dict[str, Any]]:
    """Passes and steps of stage 1 per second, in each precision."""
    rng = torch.Generator().manual_seed(0)
    own = towers["float32"]
    size, stage = own.preprocessing.size, VisionStage()
    stage = stage.model_copy(update={"schedule": stage.schedule.model_copy(update={"epochs": 1})})
    anchors = unit(torch.randn(10, own.dim, generator=rng))
    batches = OneBatch(torch.randn(batch, 3, size, size, generator=rng).to(device), torch.arange(batch) % 10, steps)
    prompts = [f"a photo of a thing {i}." for i in range(batch)]

    def passed(call: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            for _ in range(steps):
                call()
        settled(device)

    def trained(encoder: ImageEncoder) -> None:
        align_vision(stage, encoder, anchors, batches, own.logit_scale, class_cross_entropy, Context(Seeds(1)))
        settled(device)

    def repeated(step: Callable[[], None]) -> None:
        for _ in range(steps):
            step()
        settled(device)

    def multiplied(a: Tensor) -> None:
        for _ in range(PRODUCTS):
            a @ a
        settled(device)

    encoders, ways, prompted = {}, {}, {}
    for precision in PRECISIONS:
        texts = grown(towers[precision], Prompts(init=None), classes, min(classes, 10))
        prompted[precision] = step = text_step(towers[precision], texts, classes, batch)
        ways[precision, "prompts"] = lambda step=step: repeated(step)
        refused: list[dict[str, Any]] = []
        graphed = text_step(towers[precision], texts, classes, batch, Log(keep=refused.append))
        graphed()  # captures
        if refused:
            print(f"{precision}: {refused[0]['text']}", file=sys.stderr)
        else:
            ways[precision, "captured"] = lambda step=graphed: repeated(step)
        encoders[precision] = encoder = ImageEncoder(towers[precision], stage.tuning, rng)
        a = torch.randn(product, product, generator=rng).to(device, getattr(torch, precision))
        ways[precision, "stage 1"] = lambda encoder=encoder: trained(encoder)
        ways[precision, "images"] = lambda own=towers[precision]: passed(lambda: own.image(batches.pixels))
        ways[precision, "texts"] = lambda own=towers[precision]: passed(lambda: own.text(prompts))
        ways[precision, "product"] = lambda a=a: multiplied(a)
    found = in_turns(ways, repeats)
    each = operations(encoders["float32"], batches.pixels[:2])
    told = []
    for precision in PRECISIONS:
        stage1 = launches(ways[precision, "stage 1"], device) // steps
        seconds, whole = found[precision, "stage 1"].seconds / steps, found[precision, "product"].seconds
        peak = 2 * product**3 * PRODUCTS / whole
        told.append(
            {
                "precision": precision,
                "step_seconds": seconds,
                "stage1_images_per_second": batch / seconds,
                "operations_per_image": each,
                "peak": peak,
                "share_of_peak": each * batch / seconds / peak,
                "flash": has_flash(towers[precision], batches.pixels),
                "stage1_launches": stage1,
                "prompt_classes": classes,
                "prompt_step_seconds": found[precision, "prompts"].seconds / steps,
                "prompt_launches": launches(prompted[precision], device),
                "captured_step_seconds": found[precision, "captured"].seconds / steps
                if (precision, "captured") in found
                else None,
                **{
                    f"{what}_per_second": batch * steps / found[precision, what].seconds for what in ("images", "texts")
                },
                "all_seconds": {
                    what: found[precision, what].all_seconds
                    for what in ("stage 1", "images", "texts", "product", "prompts", "captured")
                    if (precision, what) in found
                },
            }
        )
    return told


@contextmanager
def parts(device: torch.device) -> Iterator[Counter]:
    """Seconds in each part of DMC-OT, and waiting for data, of whatever runs inside."""
    spent: Counter = Counter()

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            settled(device)
            mark = time.perf_counter()
            value = call(*args, **kwargs)
            settled(device)
            spent[part] += time.perf_counter() - mark
            return value

        return inside

    def next_batch(loader: Loader, *args: Any) -> Any:
        before = loader.waited
        value = plain_next(loader, *args)
        spent["waiting for data"] += loader.waited - before
        return value

    plain_next = Loader._next
    replaced = [
        (dmc_ot, "align_vision", "stage 1"),
        (TwoStageState, "features", "passes before and after"),
        (dmc_ot.DMCOT, "calibrated", "calibration"),
        (GaussianMemory, "add", "statistics"),
        (dmc_ot, "align_text", "stage 2"),
        (Evaluator, "after", "evaluation"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        Loader._next = next_batch
        for owner, name, part in replaced:
            setattr(owner, name, timed(part, getattr(owner, name)))
        yield spent
    finally:
        Loader._next = plain_next
        for owner, name, original in originals:
            setattr(owner, name, original)


def continued(towers: ClipTowers, device: torch.device, *, batch: int, repeats: int) -> dict[str, Any]:
    """A batch of test images through a tower of which the last blocks move."""
    rng = torch.Generator().manual_seed(0)
    layers = max(1, len(towers._model.vision_model.encoder.layers) // 4)
    encoder = ImageEncoder(towers, Lora(layers=layers), rng)
    pixels = torch.randn(batch, 3, *[towers.preprocessing.size] * 2, generator=rng).to(device)
    begun = encoder.trunk(pixels)

    def passed(images: Tensor) -> Tensor:
        with torch.no_grad():
            rows = encoder(images)
        settled(device)
        return rows

    ways = {"whole": lambda: passed(pixels), "continued": lambda: passed(begun)}
    found = in_turns(ways, repeats)
    return {
        "precision": towers.precision,
        "layers": layers,
        "seconds": {way: taken.seconds for way, taken in found.items()},
        "all_seconds": {way: taken.all_seconds for way, taken in found.items()},
        "launches": {way: launches(call, device) for way, call in ways.items()},
        "equal": torch.equal(found["whole"].value, found["continued"].value),
    }


def drawing(device: torch.device, *, classes: int, per_class: int, repeats: int) -> dict[str, Any]:
    """An epoch's draws on the device, from the same random numbers."""
    memory = old_classes(classes, 512, 8)

    def drawn(there: torch.device | None) -> Tensor:
        (rows,), _ = memory.draws(per_class, [torch.Generator().manual_seed(0)], device=there)
        rows = unit(rows).to(device)
        settled(device)
        return rows

    found = in_turns({"processor": lambda: drawn(None), "device": lambda: drawn(device)}, repeats)
    one, other = (found[way].value for way in ("processor", "device"))
    return {
        "classes": classes,
        "per_class": per_class,
        "seconds": {way: taken.seconds for way, taken in found.items()},
        "all_seconds": {way: taken.all_seconds for way, taken in found.items()},
        "difference": float((one - other).abs().max()),
    }


def whole_run(
    towers: ClipTowers, device: torch.device, *, images: int, classes: int, tasks: int, cuda_graph: bool = False
) -> dict[str, Any]:
    train, test = RandomImages(images, classes, seed=0), RandomImages(images // 5, classes, seed=1)
    names = tuple(f"class {c}" for c in range(classes))
    stream = task_stream(Dataset("noise", names, train, test, ("a photo of a {}.",)), step=classes // tasks)
    entry = METHODS["dmc-ot"]
    config = with_settings(entry.default_config(towers), [f"stage2.cuda_graph={json.dumps(cuda_graph)}"])
    method = entry.build(towers, config, seed=1)
    evaluator = Evaluator(stream, towers)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with parts(device) as spent:
        began = time.perf_counter()
        for task in stream.tasks:
            method.learn(task, Context(Seeds(1)))
            evaluator.after(task.index, method)
        seconds = time.perf_counter() - began
    waited = spent.pop("waiting for data")
    return {
        "precision": towers.precision,
        "images": images,
        "test_images": len(test),
        "classes": classes,
        "tasks": len(stream.tasks),
        "seconds": seconds,
        "waited": waited,
        "device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "parts": dict(spent) | {"all else": seconds - sum(spent.values())},
    }


def measured(
    device: str,
    tower: str,
    batch: int,
    steps: int,
    repeats: int,
    product: int,
    prompted: int,
    images: int,
    classes: int,
    tasks: int,
) -> dict[str, Any]:
    used = torch.device(device)
    towers = random_towers(tower, used)
    name = torch.cuda.get_device_name(used) if used.type == "cuda" else used.type
    return {
        "device": name,
        "tower": tower,
        "batch": batch,
        "product": product,
        "towers": tower_speed(
            towers, used, batch=batch, steps=steps, repeats=repeats, product=product, classes=prompted
        ),
        "continued": [continued(own, used, batch=batch, repeats=repeats) for own in towers.values()],
        "draws": drawing(used, classes=prompted, per_class=batch, repeats=repeats),
        "run": whole_run(towers["bfloat16"], used, images=images, classes=classes, tasks=tasks),
        "captured_run": whole_run(
            towers["bfloat16"], used, images=images, classes=classes, tasks=tasks, cuda_graph=True
        )
        if used.type == "cuda"
        else None,
    }


def captured_cell(one: dict[str, Any]) -> str:
    """Empty where no graph was captured."""
    if one.get("captured_step_seconds") is None:
        return ""
    return seconds_cell(one["captured_step_seconds"])


def table(report: dict[str, Any]) -> str:
    run = report["run"]
    lines = [
        f"{report['tower']} on {report['device']}, batches of {report['batch']}:",
        "",
        "| precision | images/s, one pass | texts/s, one pass | images/s, stage 1 (LoRA) | of the peak of a large product |",
        "|---|---|---|---|---|",
    ]
    for one in report["towers"]:
        speeds = (one[key] for key in ("images_per_second", "texts_per_second", "stage1_images_per_second"))
        cells = [one["precision"], *(f"{speed:,.0f}" for speed in speeds), f"{100 * one['share_of_peak']:.0f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    if flash := [one["precision"] for one in report["towers"] if one.get("flash")]:
        lines += ["", f"Passes in {' and '.join(flash)} attend by flash attention."]
    if "prompt_launches" in report["towers"][0]:  # reports before they were counted have none
        lines += [
            "",
            "| precision | launches, a step of stage 1 | launches, a prompt step | a prompt step | captured |",
            "|---|---|---|---|---|",
        ]
        for one in report["towers"]:
            cells = [one["precision"], f"{one['stage1_launches']:,}", f"{one['prompt_launches']:,}"]
            cells.append(f"{seconds_cell(one['prompt_step_seconds'])}, {one['prompt_classes']} classes")
            cells.append(captured_cell(one))
            lines.append(f"| {' | '.join(cells)} |")
    for one in report.get("continued", []):
        spent = {way: seconds_cell(seconds) for way, seconds in one["seconds"].items()}
        lines += [
            "",
            f"A batch of test images, {one['precision']}, LoRA on the last {counted(one['layers'], 'block')}: the whole tower "
            f"{spent['whole']} ({one['launches']['whole']:,} launches), behind the frozen blocks {spent['continued']} "
            f"({one['launches']['continued']:,}); {'equal to the bit' if one['equal'] else 'not equal to the bit'}.",
        ]
    if "draws" in report:
        draws = report["draws"]
        spent = {way: seconds_cell(seconds) for way, seconds in draws["seconds"].items()}
        lines += [
            "",
            f"{draws['per_class']} draws of each of {draws['classes']} full covariances, d = 512: made on the processor and copied "
            f"{spent['processor']}, made on the device {spent['device']}; at most {draws['difference']:.0e} apart.",
        ]
    lines += [
        "",
        f"DMC-OT on {run['images']:,} images of {run['classes']} classes in {run['tasks']} tasks, {run['precision']}: "
        f"{seconds_cell(run['seconds'])}, of which {seconds_cell(run['waited'])} waiting for data"
        + (f"; {bytes_cell(run['device_bytes'])} of the device's memory." if run["device_bytes"] else "."),
        "",
        "| part | time | share |",
        "|---|---|---|",
    ]
    for part, took in sorted(run["parts"].items(), key=lambda item: -item[1]):
        lines.append(f"| {part} | {seconds_cell(took)} | {100 * took / run['seconds']:.0f} % |")
    if other := report.get("captured_run"):
        stage2 = seconds_cell(other["parts"]["stage 2"])
        lines += ["", f"With captured steps {seconds_cell(other['seconds'])}, of which stage 2 {stage2}."]
    return "\n".join([*lines, "", machine_line(report)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--into", type=Path)
    args = parser.parse_args()
    if SIZES[args.size]["device"] == "cuda" and not torch.cuda.is_available():
        parser.error(f"--size {args.size}: PyTorch finds no CUDA here; --size tiny runs on the processor")
    report = surroundings() | {"size": args.size} | measured(**SIZES[args.size])
    handed_out(report, table(report), "accelerator", args.out, args.into)


if __name__ == "__main__":
    main()
