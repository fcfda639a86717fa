"""Self-distillation with elastic students (POA, 2408.01031), of which DINO's is the case without them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nestnet.errors import UserError, one_of
from nestnet.models.layers import on_grid
from nestnet.objectives import health
from nestnet.objectives.base import Objective, Pass, Targets
from nestnet.objectives.projection import init_heads, scores

CLOSEST = 1e-4


def self_distillation(
    prototypes: Sequence[int] = (8192, 16384, 32768, 65536), hidden: int = 2048, bottleneck: int = 256,
    intact_weight: float = 0.8, same_view: float = 1.0, pairs: str = "joint", koleo: float = 0.1,
    koleo_reduce: str = "mean", centering: str = "sinkhorn", iterations: int = 3, center_momentum: float = 0.9,
    student_temperature: float = 0.1, teacher_temperature: float = 0.07, warmup_temperature: float = 0.04,
    warmup_steps: int = 0, frozen_steps: int = 0, patches: float = 0.0, patch_delay: int = 0,
    told_after: int = 200) -> Objective:
  """What students of a step learn from a moving average of the largest network, and from one another.

  The first term of a step is the intact student, the largest network; later ones are elastic students. With
  λ the `intact_weight`, and H heads, of which each gives assignments to its prototypes,

      intact:   λ * CE(teacher, other views) + koleo
      elastic:  (1 - λ) * (CE(teacher, other views) + same_view * (CE(intact, same view) over global crops
                + over local crops)) + koleo

  means over heads, the batch and the views. The teacher sees the global crops, students all of them. A term
  without an intact one before it, as in training a network alone, is of the first kind.

  Args:
    prototypes: K of each head.
    hidden: Width of the MLPs of the heads.
    bottleneck: Width of what they give.
    intact_weight: λ; 1 for a network alone.
    same_view: Weight of the terms against the intact student; 0 leaves them out (an ablation of the paper).
    pairs: `"joint"`: the cross-view term is a mean over all pairs of a global and another view, as in the
      authors' code; `"separate"`: the mean over global pairs plus that over local ones, as in eq. 10.
    koleo: Weight of the KoLeo term, which spreads features of a global crop (1806.03198), summed over crops.
    koleo_reduce: Whether the intact and the elastic student's are averaged, `"mean"` as in the authors' code,
      or added, `"sum"` as in appendix C.2.
    centering: Of the teacher's assignments: `"sinkhorn"` (over the global batch), or `"ema"` (DINO).
    iterations: Of Sinkhorn-Knopp.
    center_momentum: Decay of the average of the teacher's scores.
    student_temperature: Of students, and of the intact one where it is the target.
    teacher_temperature: After the warm-up.
    warmup_temperature: At its beginning.
    warmup_steps: Over which the temperature rises linearly.
    frozen_steps: During which prototypes do not learn.
    patches: Weight of iBOT's term over masked patches (2111.07832), weighted between students as the cross-view
      term; 0: none. It needs `data.crops` with masks, and a network that is `masked`.
    patch_delay: Step at which it begins.
    told_after: Steps from which on a collapse is told.

  Raises:
    ValueError: Fewer than 2 prototypes, or another option that is out of range.
  """
  prototypes = tuple(prototypes)
  _check(prototypes, hidden, bottleneck, iterations, intact_weight, center_momentum,
         (student_temperature, teacher_temperature, warmup_temperature),
         {"pairs": pairs, "koleo_reduce": koleo_reduce, "centering": centering},
         {"same_view": same_view, "koleo": koleo, "patches": patches, "warmup_steps": warmup_steps,
          "frozen_steps": frozen_steps, "patch_delay": patch_delay, "told_after": told_after})
  count, uniform = len(prototypes), sum(map(math.log, prototypes)) / len(prototypes)
  each_koleo = koleo * (0.5 if koleo_reduce == "mean" else 1.0)

  def init(rng, model, space):
    params, axes = init_heads(rng, model, prototypes, hidden, bottleneck)
    kinds = ("global", "patches") if patches else ("global",)
    centers = {kind: {name: jnp.zeros(k) for name, k in zip(params, prototypes)} for kind in kinds}
    return params, axes, centers if centering == "ema" else {}

  def forward(apply, batch):
    seen = _apply(apply, batch["global"], batch["mask"] if patches else None)
    return seen | ({"local": _apply(apply, batch["local"])["global"]} if "local" in batch else {})

  def forward_teacher(apply, batch):
    return _apply(apply, batch["global"], batch["mask"] if patches else None, hide=False)

  def teach(params, state, outputs, batch, step):
    temperature = warmup_temperature + (teacher_temperature - warmup_temperature) * jnp.clip(
      step / max(warmup_steps, 1), 0.0, 1.0)
    found: dict[str, Any] = {}
    for kind in ("global", "patches") if patches else ("global",):
      rows = batch["mask"] if kind == "patches" else jnp.ones(outputs[kind].shape[:-1], bool)
      for name, head in params.items():
        raw = scores(head, outputs[kind])
        if centering == "sinkhorn":
          assigned = sinkhorn(raw / temperature, rows, iterations)
        else:
          center = state[kind][name].reshape((1,) * (raw.ndim - 1) + (-1,))
          assigned = jax.nn.softmax((raw - center) / temperature)
          # An average over all that are there, as sums of each example.
          found.setdefault(f"{kind}_sums", {})[name] = _sums(raw, rows)
        found.setdefault(kind, {})[name] = assigned
      if centering == "ema":
        found[f"{kind}_counts"] = _sums(jnp.ones((*rows.shape, 1)), rows)
    return found

  def update(state, params, outputs, step):
    def moved(kind, name, center):
      mean = outputs[f"{kind}_sums"][name].sum(0) / jnp.maximum(outputs[f"{kind}_counts"].sum(), 1)
      return center_momentum * center + (1 - center_momentum) * mean

    return {kind: {name: moved(kind, name, center) for name, center in centers.items()}
            for kind, centers in state.items()}

  def share(params, state, outputs, batch, step):
    views = [view for view in ("global", "local") if view in outputs]
    return {view: {name: jax.nn.softmax(scores(head, outputs[view]) / student_temperature)
                   for name, head in params.items()} for view in views}

  def loss(params, state, outputs, targets: Targets, step, rng):
    teacher, first = targets.teacher, targets.first
    if teacher is None:
      raise UserError("self_distillation: a term has no teacher; allowed is recipe.teacher=ema, and a sampler "
                      "whose terms are taught, such as intact")
    frozen = step < frozen_steps
    cross = same = masked = 0.0
    for name, head in params.items():
      own = {view: jax.nn.log_softmax(scores(head, outputs[view], frozen) / student_temperature)
             for view in ("global", "local") if view in outputs}
      cross += _cross_view(own, teacher["global"][name], pairs) / count
      if first is not None and same_view:
        same += sum(_entropy(first[view][name], own[view]).mean() for view in own) / count
      if patches:
        log_p = jax.nn.log_softmax(scores(head, outputs["patches"], frozen) / student_temperature)
        masked += _masked(teacher["patches"][name], log_p, targets.batch["mask"]) / count
    spread = sum(spreading(outputs["global"][:, crop]) for crop in range(outputs["global"].shape[1]))
    begun = jnp.where(step >= patch_delay, patches, 0.0)
    weight = intact_weight if first is None else 1 - intact_weight
    total = weight * (cross + same_view * same + begun * masked) + each_koleo * spread
    assigned = next(iter(teacher["global"].values()))
    features = outputs["global"].reshape(-1, outputs["global"].shape[-1])
    sharp, used = health.entropies(assigned.reshape(-1, assigned.shape[-1]))
    return total, {
      "cross_view": cross, "koleo": spread, "feature_std": health.feature_std(features),
      "effective_rank": health.participation_ratio(features), "teacher_entropy": sharp,
      "teacher_entropy_of_mean": used} | ({"patches": masked} if patches else {})

  def watch(step, metrics):
    if step < told_after:
      return ""
    found = []
    if metrics["cross_view"] > 0.99 * uniform:
      found.append(f"the cross-view loss is {metrics['cross_view']:.4g}, that of uniform assignments (ln K) "
                   f"is {uniform:.4g}")
    if metrics["effective_rank"] < 1.1:
      found.append(f"features lie along one direction (effective rank {metrics['effective_rank']:.3g})")
    if metrics["teacher_entropy_of_mean"] < 0.05 * math.log(prototypes[0]):
      found.append("the teacher assigns everything to one prototype "
                   f"(entropy {metrics['teacher_entropy_of_mean']:.3g})")
    return found and (f"self-distillation has collapsed or did not begin: {'; '.join(found)}. A lower "
                      "teacher_temperature, a teacher that follows sooner (a lower recipe.ema) or another rate may "
                      "help.") or ""

  def passes(entries):
    made = [Pass(entries["global"][1:], entries["global"][0], entries["global"][0])]
    return (*made, *([Pass(entries["local"][1:], entries["local"][0], 0)] if "local" in entries else []))

  return Objective(
    loss=loss, init=init, forward=forward, forward_teacher=forward_teacher, teach=teach,
    update=update if centering == "ema" else None, share=share, passes=passes, watch=watch,
    needs=("global", "mask") if patches else ("global",), uses=("local",), task="representation")


def sinkhorn(scores: jax.Array, rows: jax.Array, iterations: int) -> jax.Array:
  """Assignments that use all prototypes alike (Sinkhorn-Knopp as in SwAV, 2006.09882), in the log domain.

  Args:
    scores: `[..., prototypes]`, divided by the temperature.
    rows: Booleans `[...]`: which of them count. Others are assigned without effect on these.
    iterations: At least 1.

  Returns:
    Probabilities `[..., prototypes]`.

  Example:
    >>> sinkhorn(jnp.zeros((4, 2)), jnp.ones(4, bool), 3).tolist()[0]
    [0.5, 0.5]
  """
  log_q = scores.astype(jnp.float32)
  there = rows[..., None]
  outer = tuple(range(log_q.ndim - 1))
  for _ in range(iterations):
    counted = jnp.where(there, log_q, -jnp.inf)
    log_q = log_q - jax.nn.logsumexp(counted, axis=outer, keepdims=True)
    log_q = jax.nn.log_softmax(log_q)
  return jnp.exp(log_q)


def spreading(features: jax.Array) -> jax.Array:
  """KoLeo: minus the mean logarithm of the distance to the nearest other one (1806.03198), in float32.

  Features `[batch, dim]` have length 1. Nearer than 1e-4, as duplicates are, distances count as that much and
  have no derivative.
  """
  x = features.astype(jnp.float32)
  x = x * jax.lax.rsqrt(jnp.sum(x ** 2, axis=-1, keepdims=True) + 1e-12)
  similar = jax.lax.stop_gradient(x @ x.T)
  nearest = jnp.argmax(jnp.where(jnp.eye(len(x), dtype=bool), -2.0, similar), axis=1)
  squared = jnp.sum((x - x[nearest]) ** 2, axis=-1)
  return -0.5 * jnp.log(jnp.maximum(squared, CLOSEST ** 2)).mean()


def _apply(apply, crops, mask=None, hide=True):
  """Features `[batch, crops, dim]` of crops `[batch, crops, ...]`, and of their patches where there are masks."""
  batch, several = crops.shape[:2]
  options = {} if mask is None or not hide else {"mask": mask.reshape(batch * several, -1)}
  outputs = apply(crops.reshape(batch * several, *crops.shape[2:]), **options)
  split = lambda x: x.reshape(batch, several, *x.shape[1:])
  found = {"global": split(outputs["features"])}
  if mask is None:
    return found
  return found | {"patches": split(_cells(outputs["tokens"], mask.shape[-1]))}


def _cells(tokens: jax.Array, cells: int) -> jax.Array:
  """What a network gives for the cells of a mask, `[batch, cells, dim]`: its last tokens, as many; of a coarser map
  the nearest position, as POA has it."""
  if tokens.shape[1] >= cells:
    return tokens[:, -cells:]
  side = math.isqrt(cells)
  try:
    return on_grid(tokens, (side, side)).reshape(len(tokens), cells, -1)
  except UserError as error:
    raise UserError(f"self_distillation: masks of {cells} patches, and the network gives {tokens.shape[1]} tokens: "
                    f"{error}. Allowed is patches=0, or data.crops.mask_patch as the network's patch") from None


def _entropy(target: jax.Array, log_p: jax.Array) -> jax.Array:
  return -jnp.sum(target * log_p, axis=-1)


def _cross_view(own: dict[str, jax.Array], target: jax.Array, pairs: str) -> jax.Array:
  """Cross-entropy of students' views with the teacher's other ones, `[batch, views, prototypes]` each."""
  crops = target.shape[1]
  others = [(s, t) for s in range(crops) for t in range(crops) if s != t]
  globals_ = jnp.stack([_entropy(target[:, t], own["global"][:, s]).mean() for s, t in others])
  locals_ = -jnp.einsum("btk,bnk->bnt", target, own["local"]).mean(0) if "local" in own else jnp.zeros((0, 1))
  if pairs == "joint":
    return (globals_.sum() + locals_.sum()) / (globals_.size + locals_.size)
  return globals_.mean() + (locals_.mean() if locals_.size else 0.0)


def _masked(target: jax.Array, log_p: jax.Array, mask: jax.Array) -> jax.Array:
  """iBOT's term: a mean over the masked patches of each crop, then over all crops, those without masks too."""
  of_crop = (_entropy(target, log_p) * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)
  return of_crop.mean()


def _sums(values: jax.Array, rows: jax.Array) -> jax.Array:
  """Over all of an example: `[batch, ..., k]` to `[batch, k]`, of the rows that count."""
  return (values * rows[..., None]).reshape(len(values), -1, values.shape[-1]).sum(1)


def _check(prototypes, hidden, bottleneck, iterations, intact_weight, momentum, temperatures, named, numbers):
  if not prototypes or any(not isinstance(k, int) or k < 2 for k in prototypes):
    raise UserError(f"self_distillation: prototypes={list(prototypes)}; allowed is a list of whole numbers of at "
                    "least 2, one for each head")
  if min(hidden, bottleneck, iterations) < 1 or min(temperatures) <= 0 or not (
      0 <= intact_weight <= 1 and 0 <= momentum <= 1):
    raise UserError(
      f"self_distillation: hidden={hidden}, bottleneck={bottleneck}, iterations={iterations}, intact_weight="
      f"{intact_weight}, center_momentum={momentum}, temperatures {', '.join(map(str, temperatures))}; allowed: "
      "at least 1 for the first three, [0, 1] for the next two, temperatures above 0")
  for option, allowed in (("pairs", ("joint", "separate")), ("koleo_reduce", ("mean", "sum")),
                          ("centering", ("sinkhorn", "ema"))):
    if named[option] not in allowed:
      raise one_of(f"self_distillation: {option}", named[option], allowed)
  for option, value in numbers.items():
    if value < 0:
      raise UserError(f"self_distillation: {option}={value}; allowed is at least 0")
