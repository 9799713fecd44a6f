"""One small generator per class: what was learned of its features, drawn from instead of a fitted density.

Letters: u latent (l), h hidden units, x features (d); x = relu(u A + a) B + m + s e with u ~ N(0, I_l), e ~ N(0, I_d).
It is the decoder of a variational autoencoder; what encodes is not kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cairn.errors import NotFinite, ResultError
from cairn.maths.gaussian import AffineMap
from cairn.memory.protocol import rows_by_class
from cairn.types import Features, Labels

CHUNK_VALUES = 2**24
"""Numbers that drawing holds at once beside its result: 64 MiB in float32."""


class Decoders(NamedTuple):
    """The numbers of k generators, in float32."""

    A: Float[Tensor, "k l h"]
    a: Float[Tensor, "k h"]
    B: Float[Tensor, "k h d"]
    m: Float[Tensor, "k d"]
    s: Float[Tensor, "k d"]

    @classmethod
    def empty(cls, latent: int, hidden: int, dim: int) -> Decoders:
        shapes = ((latent, hidden), (hidden,), (hidden, dim), (dim,), (dim,))
        return cls(*(torch.zeros(0, *shape) for shape in shapes))

    def rows(self, index: Sequence[int]) -> Decoders:
        return Decoders(*(tensor[list(index)] for tensor in self))

    def to(self, device: torch.device | str) -> Decoders:
        return Decoders(*(tensor.to(device) for tensor in self))


class GeneratorMemory:
    """A generator for every class c = 0..k-1 seen so far. Immutable: `add`, `moved` and `without` return another memory.

    Tensors live on the CPU; draws are made on the generator's device. 4 (l h + h + h d + 2 d) + 8 bytes per class.

    Source: Frascaroli et al., CLIP with Generative Latent Replay (2024), for a variational autoencoder per class on frozen
    embeddings. The noise s e of its likelihood, which draws include, and what becomes of a class that returns are ours.
    """

    def __init__(self, counts: Int[Tensor, " k"], decoders: Decoders):
        self._counts, self._decoders = counts, decoders

    @classmethod
    def empty(cls, latent: int, hidden: int, dim: int) -> GeneratorMemory:
        return cls(torch.zeros(0, dtype=torch.int64), Decoders.empty(latent, hidden, dim))

    @property
    def dim(self) -> int:
        return self._decoders.m.shape[1]

    @property
    def classes(self) -> int:
        return len(self._counts)

    @property
    def counts(self) -> Int[Tensor, " k"]:
        """Features each class was learned from."""
        return self._counts.clone()

    @property
    def means(self) -> Float[Tensor, "k d"]:
        """Means of what is drawn, exact, in float64: E[relu(v)] B + m, v_j ~ N(a_j, |A_j|^2), A_j column j of A.

        E[relu(v)] = a Phi(a / r) + r phi(a / r), r = |A_j|.
        """
        A, a, B, m, _ = (tensor.double() for tensor in self._decoders)
        r = A.norm(dim=1).clamp(min=torch.finfo(A.dtype).tiny)
        density = torch.exp(-0.5 * (a / r) ** 2) / math.sqrt(2 * math.pi)
        return torch.einsum("kh,khd->kd", a * torch.special.ndtr(a / r) + r * density, B) + m

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def add(
        self,
        features: Features,
        labels: Labels,
        train: Callable[[list[Float[Tensor, "_ d"]]], Decoders],
        generator: torch.Generator,
    ) -> GeneratorMemory:
        """With these features learned: `train` is given the rows of each class present, in order, and makes its generators.

        A class held already is trained anew, on as many draws of its generator as it was learned from and the new rows.
        Raises DataError where new labels leave a gap after 0..k-1, NotFinite where what was trained is not finite.
        """
        arrived = rows_by_class(features, labels, self.dim, self.classes)
        if not arrived:
            return self
        rows, k = [], max(self.classes, *(c + 1 for c in arrived))
        for c, index in arrived.items():
            held = self.draw(int(self._counts[c]), generator, [c])[0] if c < self.classes else features[:0]
            rows.append(torch.cat([held.to(features), features[index.to(features.device)]]))
        made = train(rows)
        if not all(tensor.isfinite().all() for tensor in made):
            raise NotFinite("a trained generator is not finite: lower its learning rate")
        where = {c: c for c in range(k)} | {c: self.classes + i for i, c in enumerate(arrived)}
        joined = Decoders(*(torch.cat(pair) for pair in zip(self._decoders, made, strict=True)))
        counts = torch.cat([self._counts, self._counts.new_zeros(k - self.classes)])
        counts[list(arrived)] += torch.tensor([len(index) for index in arrived.values()])
        return GeneratorMemory(counts, joined.rows(list(where.values())))

    def moved(self, maps: AffineMap | Sequence[AffineMap]) -> GeneratorMemory:
        """With class c carried along by x -> T x + b, or all by the same: B T^T, T m + b; of T diag(s^2) T^T the diagonal."""
        maps = maps if isinstance(maps, AffineMap) else AffineMap(*map(torch.stack, zip(*maps, strict=True)))
        T, b = maps.A.float(), maps.b.float()
        T = T.expand(self.classes, -1, -1)
        A, a, B, m, s = self._decoders
        m, s = (T @ m[..., None])[..., 0] + b, (T**2 @ (s**2)[..., None])[..., 0].sqrt()
        return GeneratorMemory(self._counts, Decoders(A, a, B @ T.mT, m, s))

    def without(self, c: int) -> GeneratorMemory:
        """With class c gone and later classes one number lower. Raises IndexError for a class not held."""
        self._known(c)
        kept = [i for i in range(self.classes) if i != c]
        return GeneratorMemory(self._counts[kept], self._decoders.rows(kept))

    def draw(
        self, per_class: int, generator: torch.Generator, classes: Sequence[int] | None = None
    ) -> tuple[Features, Labels]:
        """`per_class` features of each of `classes` (all of them if None), grouped by class, and their labels.

        Features are float32 on the generator's device and not normalised. Raises IndexError for a class not held.
        """
        (features,), labels = self.draws(per_class, [generator], classes)
        return features, labels

    def draws(
        self,
        per_class: int,
        generators: Sequence[torch.Generator],
        classes: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> tuple[list[Features], Labels]:
        """What `draw` gives of each generator in turn, to the bit."""
        wanted = [self._known(c) for c in (range(self.classes) if classes is None else classes)]
        source = generators[0].device
        features = [torch.empty(len(wanted), per_class, self.dim, device=source) for _ in generators]
        step = max(1, CHUNK_VALUES // max(1, per_class * self.dim, self._decoders.B[:1].numel()))
        for start in range(0, len(wanted), step):
            chunk = self._decoders.rows(wanted[start : start + step]).to(source)
            for own, generator in zip(features, generators, strict=True):
                own[start : start + step] = generated(chunk, per_class, generator)
        labels = torch.tensor(wanted, dtype=torch.int64).repeat_interleave(per_class)
        return [own.flatten(0, 1).to(device or source) for own in features], labels.to(device or source)

    def tell_repairs(self, log: Callable[..., object]) -> None:
        """Nothing has to be repaired before it is drawn from."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything stored, as contiguous tensors: `counts` (int64) and the decoders' (float32)."""
        return {"counts": self._counts, **self._decoders._asdict()}

    def restored(self, state: dict[str, Tensor]) -> GeneratorMemory:
        """The memory whose `state_dict` this is, with the sizes of this one. Raises ResultError if it does not fit."""
        _, latent, hidden = self._decoders.A.shape
        return self.from_state(state, latent, hidden, self.dim)

    @classmethod
    def from_state(cls, state: dict[str, Tensor], latent: int, hidden: int, dim: int) -> GeneratorMemory:
        """The memory whose `state_dict` this is. Raises ResultError where names, types or shapes are not those of its sizes."""
        expected = cls.empty(latent, hidden, dim).state_dict()
        k = len(state.get("counts", ()))
        for name, tensor in expected.items():
            given = state.get(name)
            if given is None or given.dtype != tensor.dtype or given.shape != (k, *tensor.shape[1:]):
                raise ResultError(
                    f"memory state '{name}' does not fit {latent} latents, {hidden} units and width {dim}"
                )
        held = {name: state[name].cpu().contiguous() for name in expected}
        return cls(held.pop("counts"), Decoders(**held))

    def _known(self, c: int) -> int:
        if not 0 <= c < self.classes:
            raise IndexError(f"class {c} of a memory that holds classes 0 to {self.classes - 1}")
        return int(c)


def generated(decoders: Decoders, n: int, generator: torch.Generator) -> Float[Tensor, "k n d"]:
    """n rows of each generator: relu(u A + a) B + m + s e."""
    A, a, B, m, s = decoders
    u = torch.randn(len(A), n, A.shape[1], generator=generator, device=A.device)
    e = torch.randn(len(A), n, B.shape[2], generator=generator, device=A.device)
    return (u @ A + a[:, None]).relu() @ B + m[:, None] + s[:, None] * e
