"""Pre-train the embedded `tiny` towers: a small CLIP, contrastively, on caption-image pairs of the drawn world.

    python experiments/pretrain_tiny.py --out cairn/towers/tiny

Two cores, under 40 minutes. The stream's and the development stream's compositions are never drawn here, and the
style is `PLAIN`. The loss is the symmetric contrastive one of CLIP with several positives: a caption that says only
"a red star" is true of every red star in the batch, so its target is spread evenly over the images it is true of.
The same loss is taken once more between captions and patches (a pair's similarity is the mean of its best patches), so
that patches mean something at this size.

The vocabulary is the one that the package ships: its trainer breaks ties in an order of its own, so that only with the
same vocabulary are the same weights found again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.functional import log_softmax, normalize
from transformers import CLIPConfig, CLIPModel

from cairn.data import shapes

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SPECIAL = ["<unk>", "<pad>", "<reserved>", "<|startoftext|>", "<|endoftext|>"]
BOS, EOS, PAD, POSITIONS = 3, 4, 1, 32
TOKENIZER = Path(shapes.__file__).parents[1] / "towers" / "tiny" / "tokenizer.json"


def scenes(number: int, seed: int, part: str = "pretraining") -> list[shapes.Scene]:
    rng = np.random.default_rng(seed)
    choices = shapes.compositions(part)
    picked = rng.integers(len(choices), size=number)
    return [
        shapes.Scene(*choices[k], background=int(rng.integers(len(shapes.BACKGROUNDS))), seed=int(rng.integers(2**31)))
        for k in picked
    ]


def drawn(batch: list[shapes.Scene], style: shapes.Style = shapes.PLAIN) -> np.ndarray:
    return np.stack([shapes.draw(scene, style).pixels for scene in batch])


def tokenizer(corpus: list[str]) -> Tokenizer:
    """Byte-level BPE: whole words of the world's captions, and any other text in pieces."""
    built = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    built.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=SPECIAL,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    built.train_from_iterator(corpus + letters, trainer)
    built.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", BOS), ("<|endoftext|>", EOS)]
    )
    return built


def model(width: int, vocabulary: int) -> CLIPModel:
    text = dict(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=vocabulary,
        max_position_embeddings=POSITIONS,
        hidden_act="gelu",
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    vision = dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=6,
        num_attention_heads=width // 32,
        image_size=shapes.SIZE,
        patch_size=8,
        hidden_act="gelu",
    )
    return CLIPModel(CLIPConfig(projection_dim=width, text_config=text, vision_config=vision))


def padded(rows: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def pixels(batch: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
    """Normalised pixels; with a generator, mirrored half of the time, shifted by up to 3 and jittered in colour."""
    x = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
    if rng is not None:
        flip = torch.from_numpy(rng.random(len(x)) < 0.5)
        x[flip] = x[flip].flip(-1)
        wide = torch.nn.functional.pad(x, (3, 3, 3, 3), mode="replicate")
        dy, dx = rng.integers(0, 7, (2, len(x)))
        x = torch.stack([w[:, a : a + shapes.SIZE, b : b + shapes.SIZE] for w, a, b in zip(wide, dy, dx, strict=True)])
        x = x * torch.from_numpy(rng.uniform(0.9, 1.1, (len(x), 3, 1, 1))).float()
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def loss(similarity: torch.Tensor, scale: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy of image-text similarities, targets spread evenly over the true pairs (n x n)."""
    logits = scale * similarity
    rows, columns = true / true.sum(1, keepdim=True), true / true.sum(0, keepdim=True)
    return -0.5 * ((rows * log_softmax(logits, 1)).sum(1).mean() + (columns * log_softmax(logits, 0)).sum(0).mean())


def embeddings(clip: CLIPModel, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit embeddings of images (n x d), of their patches (n x p x d) and of texts (m x d)."""
    seen = clip.vision_model(pixel_values=x)
    image = clip.visual_projection(seen.pooler_output)
    patches = clip.visual_projection(clip.vision_model.post_layernorm(seen.last_hidden_state[:, 1:]))
    text = clip.get_text_features(ids, attention_mask=(ids != PAD).long()).pooler_output
    return normalize(image, dim=-1), normalize(patches, dim=-1), normalize(text, dim=-1)


def best_patches(patches: torch.Tensor, text: torch.Tensor, number: int = 6) -> torch.Tensor:
    """Image-text similarity (n x m) as the mean over the image's patches nearest to the text."""
    return (patches @ text.T).topk(number, dim=1).values.mean(1)


@torch.no_grad()
def accuracy(clip: CLIPModel, built: Tokenizer, style: shapes.Style, part: str = "dev", number: int = 800) -> float:
    """Zero-shot accuracy over a part's 40 classes."""
    clip.eval()
    choices = shapes.compositions(part)
    batch = scenes(number, 99, part)
    truth = torch.tensor([choices.index((s.shape, s.colour, s.texture)) for s in batch])
    ids = padded([e.ids for e in built.encode_batch([f"a photo of a {shapes.class_name(c)}." for c in choices])])
    image, _, text = embeddings(clip, pixels(drawn(batch, style)), ids)
    clip.train()
    return ((image @ text.T).argmax(1) == truth).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cairn/towers/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--images", type=int, default=60_000, help="scenes drawn once and seen again mirrored and shifted"
    )
    parser.add_argument("--steps", type=int, default=1_100)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--patch-weight", type=float, default=0.3)
    parser.add_argument("--new-tokenizer", action="store_true", help="train another vocabulary first")
    parser.add_argument("--compile", action="store_true", help="torch.compile the vision tower")
    parser.add_argument("--every", type=int, default=50, help="steps between printed lines")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    pool = scenes(args.images, args.seed)
    corpus = [shapes.caption(pool[i % len(pool)], rng)[0] for i in range(20_000)]
    built = tokenizer(corpus) if args.new_tokenizer else Tokenizer.from_file(str(TOKENIZER))
    clip = model(args.width, built.get_vocab_size())
    parameters = sum(p.numel() for p in clip.parameters())
    with multiprocessing.Pool() as workers:
        chunks = [pool[i : i + 500] for i in range(0, len(pool), 500)]
        images = np.concatenate(workers.map(drawn, chunks))
    print(
        f"{parameters / 1e6:.2f} M parameters, {len(images)} scenes drawn in {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    if args.compile:
        clip.vision_model.encoder = torch.compile(clip.vision_model.encoder)

    decayed = [p for p in clip.parameters() if p.ndim > 1]
    plain = [p for p in clip.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    warm = min(100, args.steps // 10)
    factor = lambda step: min((step + 1) / warm, 0.5 * (1 + np.cos(np.pi * step / args.steps)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    order, mean_loss = np.array([], dtype=int), 0.0
    for step in range(args.steps):
        if len(order) < args.batch:
            order = rng.permutation(len(pool))
        picked, order = order[: args.batch], order[args.batch :]
        texts, claims = zip(*(shapes.caption(pool[i], rng) for i in picked), strict=True)
        claim = torch.tensor(claims)
        facts = torch.tensor([(s.shape, s.colour, s.texture, s.background) for s in (pool[i] for i in picked)])
        true = ((claim[None] == facts[:, None]) | (claim[None] == -1)).all(-1).float()
        ids = padded(
            [
                [*e.ids[: POSITIONS - 1], EOS] if len(e.ids) > POSITIONS else e.ids
                for e in built.encode_batch(list(texts))
            ]
        )
        image, patches, text = embeddings(clip, pixels(images[picked], rng), ids)
        scale = clip.logit_scale.exp()
        value = loss(image @ text.T, scale, true) + args.patch_weight * loss(best_patches(patches, text), scale, true)
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, np.log(100.0))
        mean_loss += value.item() / args.every
        if (step + 1) % args.every == 0:
            line = f"step {step + 1} loss {mean_loss:.3f} {(step + 1) * args.batch / (time.perf_counter() - start):.0f} pairs/s"
            if (step + 1) % (4 * args.every) == 0 or step + 1 == args.steps:
                line += f" plain {accuracy(clip, built, shapes.PLAIN):.3f} shifted {accuracy(clip, built, shapes.SHIFTED):.3f}"
            print(line, f"scale {clip.logit_scale.exp().item():.1f}", flush=True)
            mean_loss = 0.0

    args.out.mkdir(parents=True, exist_ok=True)
    if args.compile:
        clip.vision_model.encoder = clip.vision_model.encoder._orig_mod
    state = {k: v.half().contiguous() for k, v in clip.state_dict().items() if not k.endswith("position_ids")}
    save_file(state, args.out / "model.safetensors", metadata={"format": "pt"})
    clip.config.dtype = "float16"
    clip.config.save_pretrained(args.out)
    built.save(str(args.out / "tokenizer.json"))
    (args.out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL[BOS],
                "eos_token": SPECIAL[EOS],
                "pad_token": SPECIAL[PAD],
                "unk_token": SPECIAL[0],
                "model_max_length": POSITIONS,
            },
            indent=2,
        )
        + "\n"
    )
    side = {"height": shapes.SIZE, "width": shapes.SIZE}
    (args.out / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": shapes.SIZE},
                "resample": 3,
                "do_center_crop": True,
                "crop_size": side,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": MEAN,
                "image_std": STD,
                "do_convert_rgb": True,
            },
            indent=2,
        )
        + "\n"
    )
    card = {
        "command": "python experiments/pretrain_tiny.py",
        "date": date.today().isoformat(),
        **{key: value for key, value in vars(args).items() if key not in ("out", "every")},
        "parameters": parameters,
        "seconds": round(time.perf_counter() - start),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sha256": hashlib.sha256((args.out / "model.safetensors").read_bytes()).hexdigest(),
        "dev_zero_shot_plain": round(accuracy(clip, built, shapes.PLAIN), 4),
        "dev_zero_shot_shifted": round(accuracy(clip, built, shapes.SHIFTED), 4),
    }
    (args.out / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
