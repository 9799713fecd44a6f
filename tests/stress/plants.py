"""Bugs to plant: where, the text as it is, the text with the bug, and the tests that must notice."""

from __future__ import annotations

from typing import NamedTuple


class Plant(NamedTuple):
    name: str
    file: str
    """Below `cairn/`."""
    old: str
    """Stands there once."""
    new: str
    tests: tuple[str, ...]
    """Below `tests/`."""


VALUES = ("methods/test_values.py",)
CLIPOOD = ("methods/test_clipood.py",)
DMC = ("methods/test_dmc.py", "methods/test_values.py")
GAUSSIAN, SHRINKAGE, BURES, DRIFT = ((f"maths/test_{name}.py",) for name in ("gaussian", "shrinkage", "bures", "drift"))
TRANSPORT, ALIGNMENT, RIDGE, LOSSES = (
    (f"maths/test_{name}.py",) for name in ("transport", "alignment", "ridge", "losses")
)
MEMORY, REPLAY, SECOND, GENERATORS = (
    (f"memory/test_{name}.py",) for name in ("gaussians", "replay", "second_order", "generators")
)
FIT, TUNING, HEADS = ("training/test_fit.py",), ("towers/test_tuning.py",), ("methods/test_heads.py",)
METRICS, EVALUATE = ("experiment/test_metrics.py",), ("experiment/test_evaluator.py",)

PLANTS = (
    # maths
    Plant("rows times the factor, untransposed", "maths/gaussian.py", "(noise @ factor.mT)", "(noise @ factor)", GAUSSIAN),
    Plant("moments merged without the gap of the means", "maths/gaussian.py", "n1 * n2 / n**2 * torch.outer", "0 * torch.outer", GAUSSIAN),
    Plant("merged mean weighs the first sample", "maths/gaussian.py", "m1.double() + n2 / n * gap", "m1.double() + n1 / n * gap", GAUSSIAN),
    Plant("remainder of a low rank lost", "maths/gaussian.py", "rest = diag + (U[:, r:] ** 2) @ lam[r:]", "rest = diag", GAUSSIAN),
    Plant("shrinkage by n in place of n + 1", "maths/shrinkage.py", "(n + 1) * (square - trace**2 / d)", "n * (square - trace**2 / d)", SHRINKAGE),
    Plant("isotropic part of the trace, not of its average", "maths/shrinkage.py", "return 1 - rho, rho * trace / d", "return 1 - rho, rho * trace", (*SHRINKAGE, *MEMORY)),
    Plant("ridge not relative to the width", "maths/shrinkage.py", "eps * _trace(S) / S.shape[-1]", "eps * _trace(S)", SHRINKAGE),
    Plant("Bures distance without the factor 2", "maths/bures.py", "_trace(S1) - 2 * cross", "_trace(S1) - cross", BURES),
    Plant("Gaussian map keeps the target mean", "maths/bures.py", "m1 - (A @ m0[..., None])[..., 0]", "m1 - m0", BURES),
    Plant("kernel of twice the width", "maths/drift.py", "(-2 * sigma**2)", "(-4 * sigma**2)", DRIFT),
    Plant("regression map untransposed", "maths/drift.py", "_identity(Z0).A + D.T", "_identity(Z0).A + D", DRIFT),
    Plant("local map untransposed", "maths/drift.py", "AffineMap(shared.A + D.T,", "AffineMap(shared.A + D,", DRIFT),
    Plant("local map keeps the shared offset", "maths/drift.py", "shared.b + w @ E - m @ D", "shared.b", DRIFT),
    Plant("mean shift backwards", "maths/drift.py", "b=(Z1 - Z0).mean(0)", "b=(Z0 - Z1).mean(0)", DRIFT),
    Plant("guard that never falls back", "maths/drift.py", "if health.condition > self._limit:", "if health.condition > 1e300:", (*DRIFT, "methods/test_dmc.py")),
    Plant("ridge that held-out classes like least", "maths/drift.py", "LAMS[int(errors.argmin())]", "LAMS[int(errors.argmax())]", DRIFT),
    Plant("plan with the rows' weights on columns", "maths/transport.py", "g = log_b - (M + f[..., :, None]).logsumexp(-2)", "g = log_b.mean() - (M + f[..., :, None]).logsumexp(-2)", TRANSPORT),
    Plant("padded tokens at full weight", "maths/alignment.py", "weight[size - 1 :] = 1 / (size * (copies + 1))", "weight[size - 1 :] = 1 / size", ALIGNMENT),
    Plant("patches least alike chosen", "maths/alignment.py", "chosen = ranked.topk(K, dim=-1).indices", "chosen = (-ranked).topk(K, dim=-1).indices", ALIGNMENT),
    Plant("every candidate counts the same", "maths/alignment.py", "weighted = prior[rows, columns, None] * found.share", "weighted = found.share", ALIGNMENT),
    Plant("classes not looked at win", "maths/alignment.py", "S.amin(1, keepdim=True)", "S.amax(1, keepdim=True)", ALIGNMENT),
    Plant("ridge squared", "maths/ridge.py", "L.diagonal().add_(lam)", "L.diagonal().add_(lam**2)", (*RIDGE, *SECOND)),
    Plant("recursive head with the old inverse", "maths/ridge.py", "P = P - PH @ torch.cholesky_solve(PH.T, L)", "P = P - 0.5 * PH @ torch.cholesky_solve(PH.T, L)", RIDGE),
    Plant("margin of the wrong sign", "methods/clipood.py", "z - margin * T[y]", "z + margin * T[y]", CLIPOOD),
    Plant("contrast over all texts, not those of the batch", "maths/losses.py", "-log_share[which, torch.arange", "-log_share[0 * which, torch.arange", LOSSES),
    Plant("cosines between texts not squared", "maths/losses.py", "return ((T_new @ T_old.T) ** 2).mean()", "return (T_new @ T_old.T).mean()", LOSSES),
    # memory
    Plant("a class that comes back counts as much as before", "memory/gaussians.py", "m / (n + m) * gap, f\"mean", "0.5 * gap, f\"mean", MEMORY),
    Plant("covariance merged without the gap", "memory/gaussians.py", "bridge = (n * m / (n + m)) ** 0.5 * gap", "bridge = 0 * gap", MEMORY),
    Plant("counts overwritten", "memory/gaussians.py", "            stored.counts[c] += m", "            stored.counts[c] = m", MEMORY),
    Plant("forgets the last class's count", "memory/gaussians.py", "_Stored(without(counts, c), without(means, c), held)", "_Stored(counts[:-1], without(means, c), held)", (*MEMORY, *VALUES)),
    Plant("moved mean without the offset", "memory/gaussians.py", "_exact(A) @ stored.means[c].double() + _exact(b)", "_exact(A) @ stored.means[c].double()", MEMORY),
    Plant("covariance moved on one side", "memory/covariances.py", "_packed(A @ _unpacked(held[\"lower\"], len(A)) @ A.T)", "_packed(A @ _unpacked(held[\"lower\"], len(A)))", MEMORY),
    Plant("variances moved by A, not its squares", "memory/covariances.py", "(A * A) @ held[\"variances\"]", "A @ held[\"variances\"]", MEMORY),
    Plant("pooled covariance of classes, not of images", "memory/gaussians.py", "self._stored.counts[chunk].double() / total", "torch.ones(len(chunk), dtype=torch.float64) / len(rows)", MEMORY),
    Plant("stand-in for classes without scatter not scaled", "memory/gaussians.py", "LONE_VARIANCE * self._energies[rows] / self._dim", "LONE_VARIANCE * self._energies[rows]", MEMORY),
    Plant("draws not on the sphere", "memory/replay.py", "unit(pseudo) if self.sphere else pseudo", "pseudo", REPLAY),
    Plant("drawn rows with other rows' labels", "memory/replay.py", "names[mixed].to(", "names.to(", REPLAY),
    Plant("a small share of replay rounded to none", "memory/replay.py", "self.drawn = max(1, batch - self.real)", "self.drawn = batch - self.real", REPLAY),
    Plant("means of means", "memory/means.py", "p[c] += (own.mean(0) - p[c]) * (len(own) / n[c])", "p[c] += (own.mean(0) - p[c]) * 0.5", (*HEADS, *VALUES)),
    Plant("herding away from the mean", "memory/exemplars.py", ".norm(dim=1) + free).argmin())", ".norm(dim=1) - free).argmax())", ("methods/test_proof.py",)),
    Plant("forgets the next class's exemplars", "memory/exemplars.py", "kept = self.labels != c", "kept = self.labels != c + 1", ("methods/test_proof.py", *VALUES)),
    Plant("column of the last class forgotten", "memory/second_order.py", "without(self.D, c, 1)", "self.D[:, :-1]", (*SECOND, *VALUES)),
    Plant("generator moved without its offset", "memory/generators.py", "(T @ m[..., None])[..., 0] + b", "(T @ m[..., None])[..., 0]", GENERATORS),
    # methods
    Plant("stage 2 draws from Gaussians that stayed behind", "methods/dmc_ot.py", "self.memory = old.add(z, y)", "old, self.memory = self.memory, old.add(z, y)", VALUES),
    Plant("template share reversed", "methods/parts/two_stage.py", "unit((1 - w) * self.texts().cpu() + w * self.anchors)", "unit(w * self.texts().cpu() + (1 - w) * self.anchors)", VALUES),
    Plant("forgets the wrong anchor", "methods/parts/two_stage.py", "self.anchors = without(self.anchors, c)", "self.anchors = self.anchors[:-1]", VALUES),
    Plant("residuals freeze the wrong way round", "towers/prompts.py", "list(self.residuals)[-1:] if self.choice.freeze_old else list(self.residuals)", "list(self.residuals) if self.choice.freeze_old else list(self.residuals)[-1:]", VALUES),
    Plant("dmc draws its new classes too", "methods/dmc.py", "align_text(config.stage2, self.texts, z, y, old,", "align_text(config.stage2, self.texts, z, y, self.memory,", VALUES),
    Plant("softmax over one class", "methods/parts/stages.py", "    if len(present) > 1:\n", "    if len(present) > 0:\n", ("methods/test_one_class.py",)),
    Plant("texts of old classes repel each other", "methods/dmc_ot.py", "mean_squared_cosine(T[old.classes :], T[: old.classes])", "mean_squared_cosine(T[: old.classes], T[: old.classes])", ("methods/test_dmc.py",)),
    Plant("spa replays the last two classes alone", "methods/spa.py", "self.old.draws(self.per_class, [rng], device=x.device)", "self.old.draws(self.per_class, [rng], range(max(0, self.old.classes - 2), self.old.classes), x.device)", VALUES),
    Plant("discriminant without the volume", "methods/lda.py", "W.diagonal().log().sum() - ((x", "0 * W.diagonal().log().sum() - ((x", HEADS),
    # training
    Plant("dropout stays on", "towers/tuning.py", "            layer.generator = None\n", "            pass\n", TUNING),
    Plant("dropout does not scale", "towers/tuning.py", "x * kept / (1 - self.p)", "x * kept", TUNING),
    Plant("dropout of every step alike", "training/fit.py", "ctx.seeds.at(step=step, **part)", "ctx.seeds.at(step=0, **part)", FIT),
    Plant("average with even weights", "training/fit.py", "(x * (1 - x)) ** (self.beta - 1)", "1.0", FIT),
    Plant("start of the trajectory not averaged", "training/fit.py", "        if step == 0:\n", "        if step < 0:\n", FIT),
    Plant("every epoch in the same order", "training/fit.py", "ctx.seeds.at(epoch=epoch).generator(\"batches\")", "ctx.seeds.at(epoch=0).generator(\"batches\")", FIT),
    Plant("rates forgotten", "training/fit.py", "group[\"rate\"] * schedule.lr", "schedule.lr", FIT),
    Plant("warm-up from nothing", "training/fit.py", "return (step + 1) / warm", "return step / warm", FIT),
    Plant("a resumed stage begins its epoch again", "training/fit.py", "done, skip = divmod(course.step, len(batches))", "done, skip = course.step // len(batches), 0", FIT),
    Plant("moments not restored", "training/fit.py", "self.optimiser.load_state_dict({\"state\": moments,", "self.optimiser.load_state_dict({\"state\": {},", FIT),
    Plant("gradients not clipped", "training/fit.py", "clip_grad_norm_(parameters, schedule.clip)", "clip_grad_norm_(parameters, 1e9)", FIT),
    Plant("writer beside readers", "storage/locks.py", "self._condition.wait_for(lambda: self._readers == 0)", "pass", ("storage/test_locks.py",)),
    # evaluation
    Plant("forgetting from the first accuracy", "experiment/metrics.py", "max(A[i][j] for i in range(j, B - 1))", "A[j][j]", METRICS),
    Plant("tasks weighed the same", "experiment/metrics.py", "sum(n * a for n, a in zip(sizes, row, strict=False)) / sum(sizes[: len(row)])", "sum(a for n, a in zip(sizes, row, strict=False)) / len(row)", METRICS),
    Plant("mean over classes of which nothing is known", "experiment/metrics.py", "sum(known) / max(1, len(known))", "sum(known) / max(1, len(values))", METRICS),
    Plant("class mean given images", "experiment/run.py", "mean_of_known(e.by_class) for e", "e.seen for e", ("experiment/test_run.py",)),
    Plant("classes to come asked among all", "experiment/evaluator.py", "self._by_texts(coming, range(seen, len(self._texts))", "self._by_texts(coming, range(len(self._texts))", EVALUATE),
    Plant("a pass goes on one block too late", "towers/clip.py", "rows, begun)", "rows, begun + 1)", ("towers/test_trunk.py",)),
    Plant("the teacher's surest are the least sure", "classifier/self_training.py", "descending=True", "descending=False", ("classifier/test_self_training.py",)),
    Plant("portions are not remembered", "towers/portions.py", "self.most = -(-len(rows) // 2)", "return torch.cat([self(make, part) for part in rows.chunk(2)])", ("towers/test_portions.py",)),
    Plant("deviation of a population", "experiment/metrics.py", "/ (len(values) - 1)) ** 0.5", "/ len(values)) ** 0.5", METRICS),
)  # fmt: skip
