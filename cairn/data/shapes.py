"""A drawn world of labelled scenes: shape x colour x texture on a background, object mask known.

A scene holds one main object (the label), some smaller distractors and a background. Drawing is a pure function
of the scene, so an image is never stored: it is drawn when asked for, the same every time.

Two styles exist. `PLAIN` is what the embedded `tiny` towers were pre-trained on. `SHIFTED` is what the class stream
is drawn in: clutter, occlusion, blur and a colour cast that pre-training never showed, so that adaptation is worth
something. The compositions of the stream (and of the development stream that chooses defaults) were never shown in
pre-training either. The world is frozen: `world_hash()` must equal `WORLD_HASH`, which a test checks.

Everything is computed in float64, where the last bits of a platform's sine cannot reach a pixel's 8 bits.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cairn.data.descriptions import written_by
from cairn.data.images import Dataset

SIZE = 56
"""Height and width of a drawing, in pixels."""

SHAPES = (
    "circle", "square", "triangle", "star", "cross", "ring",
    "heart", "crescent", "arrow", "hourglass", "flower", "house",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
TEXTURES = ("plain", "striped", "dotted", "checkered", "banded")
BACKGROUNDS = ("grass", "sand", "water", "bricks", "wood", "clouds")

_RGB = np.array(
    [
        [0.86, 0.13, 0.13], [0.96, 0.52, 0.08], [0.95, 0.88, 0.16], [0.16, 0.66, 0.22],
        [0.12, 0.80, 0.84], [0.14, 0.28, 0.88], [0.52, 0.16, 0.74], [0.97, 0.50, 0.74],
    ]
)  # fmt: skip

Composition = tuple[int, int, int]
"""Indices of shape, colour and texture."""


@dataclass(frozen=True)
class Style:
    """How a scene is rendered. Ranges are uniform; radii and widths are in pixels, colours in [0, 1]."""

    radius: tuple[float, float]
    tilt: float  # largest rotation, radians
    distractors: tuple[int, int]
    clutter: tuple[int, int]  # scraps of foreign colour strewn over the whole image
    occlusion: float  # probability that a bar covers a part of the object
    blur: tuple[float, float]  # standard deviation of the Gaussian blur
    cast: tuple[float, float, float]  # factor on red, green, blue
    cast_jitter: float
    noise: float  # standard deviation of the sensor's noise


PLAIN = Style(
    radius=(11.0, 18.0), tilt=0.35, distractors=(0, 2), clutter=(0, 1), occlusion=0.0,
    blur=(0.0, 0.5), cast=(1.0, 1.0, 1.0), cast_jitter=0.08, noise=0.02,
)  # fmt: skip
SHIFTED = Style(
    radius=(17.0, 21.0), tilt=0.35, distractors=(0, 1), clutter=(1, 2), occlusion=0.2,
    blur=(0.1, 0.5), cast=(0.60, 0.78, 1.20), cast_jitter=0.05, noise=0.02,
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What is drawn. `seed` moves everything that the four named attributes leave open."""

    shape: int
    colour: int
    texture: int
    background: int
    seed: int

    @property
    def name(self) -> str:
        return class_name((self.shape, self.colour, self.texture))


@dataclass(frozen=True)
class Drawing:
    """Pixels, uint8 (SIZE, SIZE, 3), and the main object's visible mask, bool (SIZE, SIZE)."""

    pixels: np.ndarray
    mask: np.ndarray


def class_name(composition: Composition) -> str:
    """The composition in words, e.g. 'striped red star'."""
    shape, colour, texture = composition
    return f"{TEXTURES[texture]} {COLOURS[colour]} {SHAPES[shape]}"


@functools.cache
def compositions(part: str) -> tuple[Composition, ...]:
    """Compositions of one part of the world: `stream` (40), `dev` (40) or `pretraining` (the 400 others).

    Eighty are drawn at random and kept from pre-training. Of these the stream has the forty that are left after taking
    out, again and again, the one with most neighbours; two compositions are neighbours if they share two attributes.
    """
    every = [(s, c, t) for s in range(len(SHAPES)) for c in range(len(COLOURS)) for t in range(len(TEXTURES))]
    order = np.random.RandomState(2024).permutation(len(every))
    if part == "pretraining":
        return tuple(every[i] for i in np.sort(order[80:]))
    kept = [every[i] for i in order[:80]]
    stream = list(kept)
    while len(stream) > 40:
        stream.remove(max(stream, key=lambda c: (sum(_neighbours(c, o) for o in stream), -stream.index(c))))
    return tuple(stream) if part == "stream" else tuple(c for c in kept if c not in stream)


def _neighbours(a: Composition, b: Composition) -> bool:
    return sum(x == y for x, y in zip(a, b, strict=True)) == 2


# --- signed fields: negative inside; u right, v up, the object spans about [-1, 1] ---------------------------------


def _inside(shape: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    match SHAPES[shape]:
        case "circle":
            return r < 0.92
        case "square":
            return np.maximum(abs(u), abs(v)) < 0.8
        case "triangle":
            return np.maximum(0.866 * abs(u) + 0.5 * v, -v) < 0.55
        case "star":
            sector = 2 * np.pi / 5
            folded = abs((angle - np.pi / 2 + sector / 2) % sector - sector / 2)
            x, y = r * np.cos(folded), r * np.sin(folded)
            return x * 0.40 + y * 0.92 < 0.40
        case "cross":
            arm = np.minimum(np.maximum(abs(u) / 0.95, abs(v) / 0.32), np.maximum(abs(v) / 0.95, abs(u) / 0.32))
            return arm < 1.0
        case "ring":
            return abs(r - 0.70) < 0.26
        case "heart":
            x, y = 1.2 * u, 1.2 * v + 0.15
            return (x * x + y * y - 1.0) ** 3 - x * x * y**3 < 0.0
        case "crescent":
            return (r < 0.98) & (np.hypot(u - 0.45, v) > 0.72)
        case "arrow":
            head = (v > 0.0) & (abs(u) < 0.95 * (1.0 - v))
            return head | ((abs(u) < 0.27) & (v <= 0.0) & (v > -0.95))
        case "hourglass":
            return (abs(v) < 0.92) & (abs(u) < 0.14 + 0.75 * abs(v))
        case "flower":
            return r < 0.62 + 0.34 * np.cos(5 * angle)
        case _:  # house
            return ((abs(u) < 0.62) & (v <= 0.1) & (v > -0.85)) | ((v > 0.1) & (abs(u) < 0.95 * (0.95 - v)))


def _pattern(texture: int, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    period = rng.uniform(0.42, 0.56)
    phase = rng.uniform(0.0, 1.0, 2)
    a, b = u / period + phase[0], v / period + phase[1]
    match TEXTURES[texture]:
        case "plain":
            return np.zeros_like(u)
        case "striped":
            slant = rng.choice([-1.0, 1.0]) * rng.uniform(0.5, 1.0)
            return ((a + slant * b) % 1.0 < 0.5).astype(float)
        case "dotted":
            return (np.hypot(a % 1.0 - 0.5, b % 1.0 - 0.5) < 0.33).astype(float)
        case "checkered":
            return ((np.floor(1.3 * a) + np.floor(1.3 * b)) % 2).astype(float)
        case _:  # banded: concentric
            return ((np.hypot(u, v) / (0.9 * period) + phase[0]) % 1.0 < 0.5).astype(float)


def _smooth_noise(rng: np.random.Generator, cells_v: int, cells_u: int) -> np.ndarray:
    """Bilinear noise in [0, 1] on the pixel grid."""
    grid = rng.random((cells_v + 1, cells_u + 1))
    v, u = np.linspace(0, cells_v, SIZE, endpoint=False), np.linspace(0, cells_u, SIZE, endpoint=False)
    i, j = v.astype(int), u.astype(int)
    fv, fu = (v - i)[:, None], (u - j)[None, :]
    top = grid[i][:, j] * (1 - fu) + grid[i][:, j + 1] * fu
    low = grid[i + 1][:, j] * (1 - fu) + grid[i + 1][:, j + 1] * fu
    return top * (1 - fv) + low * fv


def _background(kind: int, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(float)
    fine, coarse = rng.random((SIZE, SIZE)), _smooth_noise(rng, 4, 4)
    match BACKGROUNDS[kind]:
        case "grass":
            tone, low, high = 0.5 * _smooth_noise(rng, 14, 28) + 0.5 * coarse, (0.10, 0.30, 0.08), (0.45, 0.68, 0.25)
        case "sand":
            tone, low, high = 0.6 * fine + 0.4 * coarse, (0.66, 0.55, 0.36), (0.92, 0.84, 0.64)
        case "water":
            wave = 0.5 + 0.5 * np.sin(2 * np.pi * (y / rng.uniform(6, 9) + 0.5 * coarse) + 0.15 * x)
            tone, low, high = 0.7 * wave + 0.3 * coarse, (0.05, 0.22, 0.42), (0.38, 0.62, 0.78)
        case "bricks":
            row = np.floor(y / 7)
            joint = (y % 7 < 1.2) | ((x + 6 * (row % 2) + rng.integers(0, 12)) % 12 < 1.2)
            tone, low, high = np.where(joint, 1.0, 0.45 * coarse), (0.48, 0.24, 0.18), (0.80, 0.76, 0.70)
        case "wood":
            grain = 0.5 + 0.5 * np.sin(2 * np.pi * (x / rng.uniform(8, 12) + 1.2 * _smooth_noise(rng, 2, 6)))
            tone, low, high = 0.7 * grain + 0.3 * fine, (0.32, 0.20, 0.10), (0.62, 0.44, 0.26)
        case _:  # clouds
            tone, low, high = 0.8 * _smooth_noise(rng, 3, 4) + 0.2 * coarse, (0.42, 0.58, 0.80), (0.94, 0.95, 0.98)
    return np.asarray(low) + tone[..., None] * (np.asarray(high) - np.asarray(low))


def _window(centre: np.ndarray, reach: float) -> tuple[slice, slice]:
    """The part of the image within `reach` pixels of a centre (x, y): rows, columns."""
    low = np.maximum(np.floor(centre - reach), 0).astype(int)
    high = np.minimum(np.ceil(centre + reach) + 1, SIZE).astype(int)
    return slice(low[1], max(high[1], low[1])), slice(low[0], max(high[0], low[0]))


def _coverage(shape: int, centre: np.ndarray, radius: float, tilt: float, window: tuple[slice, slice]):
    """Share of each pixel inside the shape (2 x 2 samples), and the object's coordinates u, v at pixel centres."""
    y, x = np.mgrid[window].astype(float)
    cos, sin = np.cos(tilt), np.sin(tilt)
    share = np.zeros(x.shape)
    for dy in (-0.25, 0.25):
        for dx in (-0.25, 0.25):
            a, b = (x + dx - centre[0]) / radius, -(y + dy - centre[1]) / radius
            share += 0.25 * _inside(shape, cos * a + sin * b, -sin * a + cos * b)
    a, b = (x - centre[0]) / radius, -(y - centre[1]) / radius
    return share, cos * a + sin * b, -sin * a + cos * b


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    if sigma < 0.05:
        return image
    taps = np.exp(-0.5 * (np.arange(-3, 4) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        pad = [(0, 0)] * image.ndim
        pad[axis] = (3, 3)
        padded = np.pad(image, pad, mode="edge")
        shifted = (t * np.take(padded, range(i, i + SIZE), axis=axis) for i, t in enumerate(taps))
        image = functools.reduce(np.add, shifted)
    return image


def draw(scene: Scene, style: Style) -> Drawing:
    """The scene in a style: a pure function of its arguments."""
    rng = np.random.default_rng([scene.seed, scene.shape, scene.colour, scene.texture, scene.background])
    image = _background(scene.background, rng)

    def paint(window: tuple[slice, slice], share: np.ndarray, colour: np.ndarray) -> None:
        image[window] += share[..., None] * (colour - image[window])

    radius = rng.uniform(*style.radius)
    centre = rng.uniform(0.85 * radius, SIZE - 0.85 * radius, 2)
    for _ in range(rng.integers(style.distractors[0], style.distractors[1] + 1)):
        where, size = rng.uniform(4, SIZE - 4, 2), rng.uniform(3.0, 5.0)
        shape, tilt, window = int(rng.integers(len(SHAPES))), rng.uniform(-1, 1), _window(where, 1.3 * size)
        paint(window, _coverage(shape, where, size, tilt, window)[0], _RGB[rng.integers(len(COLOURS))])

    window = _window(centre, 1.3 * radius)
    share, u, v = _coverage(scene.shape, centre, radius, rng.uniform(-style.tilt, style.tilt), window)
    base = np.clip(_RGB[scene.colour] + rng.normal(0, 0.03, 3), 0, 1)
    light = base + 0.72 * (1.0 - base)
    lit = _pattern(scene.texture, u, v, rng)[..., None]
    shade = 0.90 + 0.12 * np.clip(v, -1, 1)[..., None]
    paint(window, share, (base * (1 - lit) + light * lit) * shade)
    visible = np.zeros((SIZE, SIZE))
    visible[window] = share

    for _ in range(rng.integers(style.clutter[0], style.clutter[1] + 1)):
        at, angle = rng.uniform(0, SIZE, 2), rng.uniform(0, np.pi)
        length, width = rng.uniform(2, 9), rng.uniform(0.6, 1.6)
        window = _window(at, length + width)
        y, x = np.mgrid[window].astype(float)
        along = (x - at[0]) * np.cos(angle) + (y - at[1]) * np.sin(angle)
        across = -(x - at[0]) * np.sin(angle) + (y - at[1]) * np.cos(angle)
        scrap = ((abs(along) < length) & (abs(across) < width)).astype(float)
        paint(window, scrap, rng.random(3))
        visible[window] *= 1 - scrap
    if rng.random() < style.occlusion:
        angle, offset, width = rng.uniform(0, np.pi), rng.uniform(0.3, 0.8) * radius, rng.uniform(0.15, 0.3) * radius
        y, x = np.mgrid[0:SIZE, 0:SIZE].astype(float)
        across = (x - centre[0]) * np.cos(angle) + (y - centre[1]) * np.sin(angle)
        bar = (abs(across - offset) < width).astype(float)
        paint((slice(None), slice(None)), bar, np.full(3, rng.uniform(0.2, 0.6)))
        visible *= 1 - bar

    image = _blurred(image, rng.uniform(*style.blur))
    image = image * (np.asarray(style.cast) + rng.normal(0, style.cast_jitter, 3))
    image = image + rng.normal(0, style.noise, image.shape)
    return Drawing(np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8), visible > 0.5)


# --- captions of pre-training -----------------------------------------------------------------------------------------

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a drawing of a {}.", "here is a {}.")
"""Prompts of the stream's classes; the first is the one used where a method takes a single template."""

SHAPE_WORDS = (
    "a round disc", "four straight sides", "three corners", "five sharp points", "four equal arms",
    "a round band with a hole", "two lobes above a tip", "a thin curved moon", "a pointed tip on a stem",
    "two triangles meeting at a narrow waist", "five round petals", "a pointed roof on a box",
)  # fmt: skip
TEXTURE_WORDS = (
    "one even tone", "parallel stripes", "round pale spots", "little squares in two tones", "bands around a centre",
)  # fmt: skip
_OPENINGS = (
    "", "a photo of", "a picture of", "a drawing of", "here is", "this is", "we can see", "there is",
    "in the middle of the scene there is", "somewhere in this small picture we can see",
    "look closely and you will find that the picture shows",
    "a photo taken on a day like any other that shows among other things",
    "what you can see here when you look at the whole of this small and rather busy picture is",
)  # fmt: skip


def sentences(composition: Composition) -> tuple[str, ...]:
    """What an image of the class shows, part by part, without its name."""
    shape, colour, texture = composition
    return (
        SHAPE_WORDS[shape],
        TEXTURE_WORDS[texture],
        f"the colour {COLOURS[colour]}",
        f"{SHAPE_WORDS[shape]} and {COLOURS[colour]}",
        f"{TEXTURE_WORDS[texture]} and {COLOURS[colour]}",
        f"{SHAPE_WORDS[shape]} and {TEXTURE_WORDS[texture]}",
    )


Claim = tuple[int, ...]
"""What a caption states of shape, colour, texture and background; -1 where it is silent."""


def caption(scene: Scene, rng: np.random.Generator) -> tuple[str, Claim]:
    """A caption of the scene and what it states: all of the composition, a part, or a description of a part."""
    shape, colour, texture = SHAPES[scene.shape], COLOURS[scene.colour], TEXTURES[scene.texture]
    opening = _OPENINGS[rng.integers(len(_OPENINGS))] if rng.random() < 0.8 else ""
    keep = [bool(k) for k in rng.random(4) < (0.9, 0.85, 0.85, 0.3)]
    if rng.random() < 0.3:  # a description that does not name the class
        parts = [SHAPE_WORDS[scene.shape]] * keep[0] + [TEXTURE_WORDS[scene.texture]] * keep[2]
        parts += [("the colour " if rng.random() < 0.5 else "") + colour] * keep[1]
        text = " and ".join(parts[i] for i in rng.permutation(len(parts)))
        text = text or "something"
    else:
        words = [texture] * keep[2] + [colour] * keep[1] + [shape if keep[0] else "thing"]
        text = " ".join(words)
        text = ("an " if text[0] in "aeiou" else "a ") + text
    if keep[3]:
        text += (" on ", " in front of ")[rng.integers(2)] + BACKGROUNDS[scene.background]
    claim = tuple(
        value if stated else -1
        for value, stated in zip((scene.shape, scene.colour, scene.texture, scene.background), keep, strict=True)
    )
    return f"{opening} {text}{'.' if rng.random() < 0.5 else ''}".strip(), claim


# --- the class stream ---------------------------------------------------------------------------------------------------

TRAIN_PER_CLASS, TEST_PER_CLASS = 200, 25


class ShapesImages:
    """Scenes as lazily drawn images; `labels` index the classes in their natural order."""

    def __init__(self, scenes: Sequence[Scene], labels: np.ndarray, style: Style):
        self.scenes, self.labels, self.style = tuple(scenes), labels, style

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> np.ndarray:
        return draw(self.scenes[index], self.style).pixels

    def mask(self, index: int) -> np.ndarray:
        """Where the main object is visible, bool (SIZE, SIZE)."""
        return draw(self.scenes[index], self.style).mask

    def describe(self, index: int) -> str:
        scene = self.scenes[index]
        return f"scene {scene.seed} ({scene.name} on {BACKGROUNDS[scene.background]})"

    def identity(self, index: int) -> bytes:
        """The scene, the style, and the version of the world that draws them."""
        return f"{WORLD_HASH} {self.scenes[index]} {self.style}".encode()


def _split(part: str, split: int) -> ShapesImages:
    """Training images (0) or test images (1)."""
    classes, number = compositions(part), (TRAIN_PER_CLASS, TEST_PER_CLASS)[split]
    scenes = [
        Scene(
            *composition,
            background=(k + i) % len(BACKGROUNDS),
            seed=2 * (1000 * k + i) + split + (part == "dev") * 10**6,
        )
        for k, composition in enumerate(classes)
        for i in range(number)
    ]
    return ShapesImages(scenes, np.repeat(np.arange(len(classes)), number), SHIFTED)


def shapes_dataset(part: str = "stream") -> Dataset:
    """The 40 compositions of `stream` or `dev` in the shifted style, 200 training and 25 test images each."""
    classes = compositions(part)
    name = "shapes" if part == "stream" else f"shapes:{part}"
    names = tuple(class_name(c) for c in classes)
    said = {name: sentences(c) for name, c in zip(names, classes, strict=True)}
    author = "the drawn world itself"
    return Dataset(name, names, _split(part, 0), _split(part, 1), TEMPLATES, descriptions=written_by(author, said))


WORLD_HASH = "dd109644519016b3"
"""Frozen when zero-shot, class means, fine-tuning and joint training had been run on the world, and nothing else."""


def world_hash() -> str:
    """16 hex digits over the pixels and masks of both splits' first scenes, both styles, and the captions' words."""
    digest = hashlib.sha256(
        repr((TEMPLATES, SHAPE_WORDS, TEXTURE_WORDS, [compositions(p) for p in ("stream", "dev")])).encode()
    )
    for part in ("stream", "dev"):
        for images in (_split(part, 0), _split(part, 1)):
            for scene in images.scenes[:: len(images) // 20]:
                for style in (PLAIN, SHIFTED):
                    drawing = draw(scene, style)
                    digest.update(drawing.pixels.tobytes())
                    digest.update(np.packbits(drawing.mask).tobytes())
    return digest.hexdigest()[:16]
