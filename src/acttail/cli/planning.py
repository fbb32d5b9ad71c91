"""Plans that a command makes itself: the options, judged together, and the plan they ask for."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from acttail.base.dtypes import FAST
from acttail.cli.console import note
from acttail.cli.judge import (
    calibration_text,
    check_head,
    check_spread,
    given_curves,
    option,
    plan_of,
    sees_text,
    settings,
)
from acttail.cli.progress import work
from acttail.errors import ActTailError

if TYPE_CHECKING:
    from acttail.engine.config import EngineConfig
    from acttail.evaluate.request import PlanRequest, RequestedPlan
    from acttail.model.opened import Opened
    from acttail.plan import SparsityPlan

Sparsity = Annotated[
    float | None,
    typer.Option(
        help="Instead of a plan file: a model sparsity; its plan is made once and kept.",
        metavar="S",
    ),
]
ReadShare = Annotated[
    float | None,
    typer.Option(
        help="Instead: the share of the dense model's bytes that a token reads, head and scales included.",
        metavar="R",
    ),
]
Speedup = Annotated[
    float | None,
    typer.Option(
        help="Instead: how many times as fast as dense to decode on this machine, as it is forecast.",
        metavar="X",
    ),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        help="Instead: most the loss may rise, nats per token, on held-out text.", metavar="N"
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(help="Instead: most KL to the dense model, nats per token.", metavar="N"),
]
Allocator = Annotated[
    str | None,
    typer.Option(
        help="The rule that makes the budget: acttail, under a limit sensitivity; auto tries several on the model.",
        metavar="NAME",
    ),
]
# Instead of an allocator: the best of several, tried on the model.
AUTO = "auto"
_BUDGET_OPTIONS = ("--sparsity", "--read-share", "--speedup", "--max-loss", "--max-kl")
_BUDGETS = f"{', '.join(_BUDGET_OPTIONS[:-1])} and {_BUDGET_OPTIONS[-1]}"
# What options have when they were not given.
_TOKENS = 4096


def request_of(
    *, sparsity: float | None = None, read_share: float | None = None, speedup: float | None = None,
    max_loss: float | None = None, max_kl: float | None = None, engine: "EngineConfig | None" = None, allocator: str | None = None, rule: str | None = None, head: bool | None = None, pairs: list[str] | None = None,
    curves: str | None = None, text: str | None = None, tokens: int = _TOKENS, dtype: str = FAST,
    device_map: str | None = None, max_memory: str | None = None, ray: str | None = None,
) -> "PlanRequest":  # fmt: skip
    """Judge what a plan is to be.

    Args:
        sparsity: of --sparsity.
        read_share: of --read-share.
        speedup: of --speedup.
        max_loss: of --max-loss.
        max_kl: of --max-kl.
        engine: that decodes, for --read-share and --speedup.
        allocator: of --allocator; ``auto`` tries those that need nothing which is not given.
        rule: of --rule.
        head: of --head and --no-head.
        pairs: of --set.
        curves: of --curves; without an allocator they ask for ``sensitivity``.
        text: of --calibration-text.
        tokens: of --calibration-tokens.
        dtype: of the model that calibrates.
        device_map: of --device-map.
        max_memory: of --max-memory.
        ray: of --ray.

    Raises:
        ActTailError: not one of the first five, or something is not valid; names the option.
    """
    from acttail.allocate import DEFAULT
    from acttail.engine.config import EngineConfig
    from acttail.engine.reads import check_read_share
    from acttail.evaluate.forecast import check_speedup
    from acttail.evaluate.quality import check_limit
    from acttail.evaluate.request import FOR_QUALITY, PlanRequest
    from acttail.maths.budget import check_target

    limits = {"--max-loss": max_loss, "--max-kl": max_kl}
    budgets = {"--sparsity": sparsity, "--read-share": read_share, "--speedup": speedup}
    asked = [n for n, v in (budgets | limits).items() if v is not None]
    if len(asked) != 1:
        raise ActTailError(f"give one of {_BUDGETS}, not {' and '.join(asked) or 'none'}")
    if sparsity is not None:
        with option("--sparsity"):
            check_target(sparsity)
    if read_share is not None:
        with option("--read-share"):
            check_read_share(read_share)
    if speedup is not None:
        with option("--speedup"):
            check_speedup(speedup)
    for name, limit in limits.items():
        if limit is not None:
            with option(name):
                check_limit(limit)
    spread = check_spread(device_map, max_memory)
    loading = {"device_map": device_map, "max_memory": spread} if device_map or spread else {}
    if allocator == AUTO:
        return _auto(
            budgets,
            {"--rule": rule, "--set": pairs, "--head": head, **limits},
            curves,
            text,
            tokens,
            dtype,
            loading,
            engine or EngineConfig(),
            ray,
        )
    if allocator is None:
        if sparsity == 0 and curves is None:
            allocator = "uniform"  # there is nothing to share out
        else:
            by_quality = any(v is not None for v in limits.values()) or curves is not None
            allocator = FOR_QUALITY if by_quality else DEFAULT
    check_head(allocator, head)
    arguments = given_curves({allocator: settings(pairs)}, curves)[allocator]
    check_curves_on_ray(ray, {allocator: arguments}, loading)
    calibrated = sees_text(allocator, arguments, rule) or any(
        v is not None for v in limits.values()
    )
    return PlanRequest(
        sparsity, max_loss, max_kl, allocator, arguments, rule, head,
        calibration_text(text, needed=calibrated), tokens, dtype, loading, read_share=read_share,
        speedup=speedup, engine=engine or EngineConfig(), ray=ray,
    )  # fmt: skip


def check_curves_on_ray(
    ray: str | None, allocators: dict[str, dict[str, Any]], loading: dict[str, Any]
) -> None:
    """Refuse a cluster where no curves will be measured, or on which the model is not loaded whole.

    Raises:
        ActTailError: says which, or that Ray is not installed.
    """
    from acttail.allocate import measures_curves
    from acttail.base.distribute import check_ray

    if ray is None:
        return
    check_ray(ray)
    if not any(measures_curves(name, arguments) for name, arguments in allocators.items()):
        raise ActTailError(
            f"--ray: curves are what a cluster measures, and {', '.join(allocators)} needs none to be measured"
        )
    if loading:
        raise ActTailError("--ray: each task loads the whole model: leave out --device-map")


def _auto(
    budgets: dict[str, float | None], others: dict[str, Any], curves: str | None, text: str | None, tokens: int,
    dtype: str, loading: dict[str, Any], engine: "EngineConfig", ray: str | None,
) -> "PlanRequest":  # fmt: skip
    """Judge what is asked beside the choice of an allocator."""
    from acttail.evaluate.recommend import candidates
    from acttail.evaluate.request import PlanRequest

    for name, value in others.items():
        if value:
            raise ActTailError(f"{name} is about one allocator: name it with --allocator, not auto")
    if budgets["--sparsity"] == 0:
        raise ActTailError(
            "--sparsity: at 0 every plan is the dense model; there is nothing to choose"
        )
    if curves is not None and text is None:
        raise ActTailError("--curves: allocators are tried on text: give --calibration-text too")
    names = candidates(calibrated=text is not None)
    # Judged before a model is opened.
    arguments = given_curves({name: {} for name in names}, curves or None)
    check_curves_on_ray(ray, arguments, loading)
    return PlanRequest(
        budgets["--sparsity"], arguments={"curves": curves} if curves else {}, tokens=tokens, dtype=dtype, loading=loading,
        text=calibration_text(text, needed=False), candidates=names, read_share=budgets["--read-share"],
        speedup=budgets["--speedup"], engine=engine, ray=ray,
    )  # fmt: skip


def plan_or_request(plan: str | None, **asked: Any) -> "SparsityPlan | PlanRequest | None":
    """The plan of --plan, what else was asked for, or None for neither.

    Args:
        plan: a file.
        asked: as for :func:`request_of`.

    Raises:
        ActTailError: both, or something that is not valid; names the option.
    """
    names = {"pairs": "--set", "text": "--calibration-text"}
    given = {
        names.get(k, f"--{k.replace('_', '-')}"): v
        for k, v in asked.items()
        if k not in ("tokens", "engine")
    }
    found = [name for name, value in given.items() if value is not None]
    if plan is not None:
        if found:
            raise ActTailError(f"--plan is a whole plan: leave it out, or {', '.join(found)}")
        return plan_of(plan)
    if not found:
        return None
    if not set(_BUDGET_OPTIONS) & set(found):
        raise ActTailError(f"{found[0]} is about a plan: give one of {_BUDGETS} too")
    return request_of(**asked)


def engine_of(dtype: str | None, threads: int | None = None) -> "EngineConfig":
    """The engine whose bytes --read-share counts and whose time --speedup.

    Raises:
        ActTailError: none has these weights.
    """
    from acttail.engine.config import EngineConfig

    # What transformers alone runs is as wide as bf16.
    return EngineConfig("bf16" if dtype == "fp16" else dtype, threads=threads)


def opened_plan(
    model: "Opened", asked: "SparsityPlan | PlanRequest | None", *, fresh: bool = False
) -> "SparsityPlan | None":  # fmt: skip
    """The plan that was asked for, with a word on stderr about how it came.

    Args:
        model: that it is for.
        asked: of :func:`plan_or_request`.
        fresh: make it, whatever is kept.

    Raises:
        ActTailError: see :func:`acttail.evaluate.request.requested`.
    """
    from acttail.evaluate.request import PlanRequest, requested

    if not isinstance(asked, PlanRequest):
        return asked
    found = requested(model, asked, work, fresh=fresh)
    _say(found, asked, noted=not fresh)
    return found.plan


def _say(found: "RequestedPlan", asked: "PlanRequest", *, noted: bool) -> None:
    quality = found.quality
    for what, said in found.plan.notes.items() if noted else ():
        note(f"sparsity {found.plan.sparsity:.4f}; {what}: {said}")
    if found.recommendation is not None:
        note(found.recommendation.reason)
    elif found.kept and asked.candidates:
        note(f"{found.plan.allocator}, chosen by an earlier start (--no-cache tries again)")
    if quality is not None:
        what = "loss rises by" if asked.max_loss is not None else "KL to dense is"
        note(
            f"sparsity {quality.plan.sparsity:.3f}: on held-out calibration text the {what} "
            f"{quality.measured:.4f} nats per token (limit {quality.limit:g}, predicted KL {quality.predicted:.4f})"
        )
    elif found.kept and asked.limit is not None:
        note(
            f"sparsity {found.plan.sparsity:.3f}, found by an earlier start (--no-cache finds it again)"
        )
