"""A run's figures in sentences. Each is computed and none assumed, so a run that recovered nothing says so."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from sparsekd_ray.prune.methods import named
from sparsekd_ray.report.checks import checks
from sparsekd_ray.report.comparing import TIE, change, compared, excess, of_kind, students, verdict, with_size
from sparsekd_ray.report.document import CE, CONTROLS, KD, KL, Row, Summary
from sparsekd_ray.report.formatting import count, number, percent, signed

NEAR = 0.01  # of the MLP parameters: students closer than this in sparsity are compared as of one size


def findings(summary: Summary) -> list[str]:
    """What the figures say, in sentences."""
    parts = (_sizes, _order, _controls, _unmoved, _attribution, _students, _baselines, _drift, _spread)
    warning = summary["protocol"]["mixture"]
    expected = [check.sentence for check in checks(summary)]
    return [*([warning] if warning else []), *expected, *(text for part in parts for text in part(summary))]


def headline(summary: Summary) -> str:
    dense, rounds = summary["rows"][0], of_kind(summary, "round")
    start = f"The dense model has {count(dense['params'])} parameters and perplexity {number(dense['ppl'])}."
    if not rounds:
        pruned = "There was no round of pruning." if of_kind(summary, "baseline") else "Nothing was pruned."
        return f"{start} {pruned}"
    last, plural = rounds[-1], "s" if len(rounds) > 1 else ""
    gone = "held at zero" if last["method"] in named("masked") else "removed"
    return (
        f"{start} After {len(rounds)} round{plural} of pruning and distillation the student has "
        f"{count(last['params'])} parameters, {percent(last['sparsity'], 0)} of the MLP parameters are "
        f"{gone}, and its perplexity is {number(last['ppl'])} ({signed(change(last, dense))})."
    )


def _sizes(summary: Summary) -> Iterator[str]:
    misses = [(abs(row["sparsity"] - row["sparsity_requested"]), row["stage"]) for row in students(summary)]
    far = ", ".join(f"{stage} by {percent(miss, 2)}" for miss, stage in misses if miss > 0.001)
    if far:
        yield f"Sizes miss the request by more than 0.1 % of the MLP parameters: {far}."
    elif misses:
        widest = percent(max(misses)[0], 2)
        yield f"Every student has the requested size to within {widest} of the MLP parameters."


def _order(summary: Summary) -> Iterator[str]:
    rounds = of_kind(summary, "round")
    falls = [(a, b) for a, b in pairwise(rounds) if verdict(b, a) == "better"]
    for a, b in falls:
        beats = f"{with_size(b)} at {number(b['ppl'])} beats {with_size(a)} at {number(a['ppl'])}"
        yield f"Perplexity does not always rise with sparsity: {beats}."
    if len(rounds) > 1 and not falls:
        listed = ", ".join(f"{number(row['ppl'])} at {percent(row['sparsity'], 0)}" for row in rounds)
        yield f"After distillation perplexity rises with sparsity, ties aside: {listed}."


def _log_change(summary: Summary, row: Row, domains: Sequence[str]) -> float:
    """Change in log-perplexity from dense to `row`, summed over the test tokens of `domains`."""
    corpus, dense = summary["corpus"]["domains"], summary["rows"][0]["domains"]
    return math.fsum(corpus[d]["test_tokens"] * math.log(row["domains"][d] / dense[d]) for d in domains)


def _domains(summary: Summary, seen: bool | None) -> list[str]:
    """The evaluated domains that were in dense training, that were not, or (None) where it is not known."""
    corpus = summary["corpus"]["domains"]
    return [d for d in summary["rows"][0]["domains"] if corpus[d]["in_dense_training"] is seen]


def _controls(summary: Summary) -> Iterator[str]:
    dense, controls, corpus = summary["rows"][0], of_kind(summary, "control"), summary["corpus"]["domains"]
    if not controls:
        return
    listed = "; ".join(f"{row['stage']} {number(row['ppl'])} ({compared(row, dense)})" for row in controls)
    yield f"Controls, trained at full size, against dense at {number(dense['ppl'])}: {listed}."
    unseen, seen = _domains(summary, False), _domains(summary, True)
    if unseen and seen:
        for domains, which in ((unseen, "that dense training never saw"), (seen, "that dense training saw")):
            total = sum(corpus[d]["test_tokens"] for d in domains)
            changes = [
                (row["stage"], math.expm1(_log_change(summary, row, domains) / total)) for row in controls
            ]
            listed = ", ".join(f"{stage} {signed(mean)}" for stage, mean in changes)
            yield f"Change on text {which} ({', '.join(domains)}): {listed}."


def _unmoved(summary: Summary) -> Iterator[str]:
    """Stages whose kept weights are those they began with: their figure is no figure of training."""
    for curve in summary["curves"]:
        later = [point["valid_ppl"] for point in curve["points"] if point["step"] > 0]
        if curve["best_step"] == 0 and later:
            before, best = number(curve["points"][0]["valid_ppl"]), number(min(later))
            stage = curve["stage"]
            yield (
                f"Training did not improve {stage} (seed {curve['seed']}): its perplexity on validation text was "
                f"{before} before the first step and at best {best} after it. The weights from before training were "
                f"kept, and the figures of {stage} are theirs."
            )


def _attribution(summary: Summary) -> Iterator[str]:
    """Where the gain of Dense + KD comes from: through which of its two signals, and in which text."""
    dense, by_stage = summary["rows"][0], {row["stage"]: row for row in of_kind(summary, "control")}
    missing = [stage for stage in CONTROLS.values() if stage not in by_stage]
    if missing:
        yield f"The source of a gain is not known, because these controls are missing: {', '.join(missing)}."
        return
    both = by_stage[KD]
    if verdict(both, dense) != "better":
        yield f"There is no gain to attribute: {KD} is no better than dense ({compared(both, dense)})."
        return
    yield _signals(dense, by_stage)
    effect = compared(both, by_stage[CE])
    yield f"Effect of the teacher's KL on top of cross-entropy ({KD} against {CE}): {effect}."
    yield from _texts(summary, both)


def _signals(dense: Row, controls: dict[str, Row]) -> str:
    alone = tuple(stage for stage in (CE, KL) if verdict(controls[stage], dense) == "better")
    signal = {
        (CE,): "cross-entropy, not self-distillation",
        (KL,): "self-distillation, not cross-entropy",
        (CE, KL): "either signal",
        (): "the two signals together, for neither gains alone",
    }[alone]
    gain = {stage: math.log1p(change(row, dense)) for stage, row in controls.items()}
    shares = "".join(f"; {stage} has {percent(gain[stage] / gain[KD], 0)} of it" for stage in alone)
    return f"The gain of {KD} comes through {signal}{shares}."


def _texts(summary: Summary, both: Row) -> Iterator[str]:
    unseen = _domains(summary, False)
    if _domains(summary, None):
        yield (
            "It is not known which domains the dense model was trained on, so new text cannot be told from known text."
        )
        return
    if not unseen:
        yield "Every domain was in dense training, so the gain is more training on known text and not new text."
        return
    total = _log_change(summary, both, list(summary["rows"][0]["domains"]))
    if total < 0:
        part = _log_change(summary, both, unseen) / total
        share = "More than all" if part > 1 else percent(part, 0)
        what = "mostly new text learnt" if part >= 0.5 else "mostly a better fit to text the dense model knew"
        yield f"{share} of {KD}'s gain in log-perplexity lies in {', '.join(unseen)}: it is {what}."


def _students(summary: Summary) -> Iterator[str]:
    controls, pruned = of_kind(summary, "control"), students(summary)
    if not controls or not pruned:
        return
    base = next((row for row in controls if row["stage"] == KD), controls[0])
    listed = "; ".join(f"{with_size(row)} {compared(row, base)}" for row in pruned)
    yield f"Against {base['stage']}, which learnt from the same text at full size: {listed}."
    lost = [(row["stage"], row["pre_ppl"] or 0.0, row["ppl"], excess(row, base)) for row in pruned]
    shares = [f"{stage} {percent((pre - ppl) / over)}" for stage, pre, ppl, over in lost if over is not None]
    if shares:
        yield f"Distillation recovered this share of the excess over {base['stage']}: {', '.join(shares)}."
    ratios = [(row["trained_tokens"] / max(base["trained_tokens"], 1), row["stage"]) for row in pruned]
    longer = ", ".join(f"{stage} {ratio:.1f} ×" for ratio, stage in ratios if abs(ratio - 1) > TIE)
    if longer:
        tokens = f"the {count(base['trained_tokens'])} tokens of {base['stage']}"
        yield f"That comparison is not at equal compute. Trained in total, as multiples of {tokens}: {longer}."


def _baselines(summary: Summary) -> Iterator[str]:
    """Each baseline against the rounds that removed about as much."""
    for row in of_kind(summary, "baseline"):
        rounds = [r for r in of_kind(summary, "round") if abs(r["sparsity"] - row["sparsity"]) <= NEAR]
        none = f"No round removed about as much ({percent(row['sparsity'])})."
        against = " ".join(_against(row, round_) for round_ in rounds) or none
        yield (
            f"{row['stage']} is the dense model pruned once ({row['method']}) and distilled once. "
            f"It ends at perplexity {number(row['ppl'])}. {against}"
        )


def _against(row: Row, round_: Row) -> str:
    """`row` against a round of about its size, and whether that is at equal compute."""
    ratio = row["trained_tokens"] / max(round_["trained_tokens"], 1)
    tokens = f"the {count(round_['trained_tokens'])} tokens of {round_['stage']}"
    compute = (
        f"not at equal compute, for it trained on {ratio:.2f} × {tokens}"
        if abs(ratio - 1) > TIE
        else f"at equal compute, {tokens}"
    )
    size = f"{percent(round_['sparsity'], 0)}, {round_['method']}"
    return (
        f"Against {round_['stage']} ({size}) at {number(round_['ppl'])}: {compared(row, round_)}; {compute}."
    )


def _drift(summary: Summary) -> Iterator[str]:
    dense, drifted = summary["rows"][0]["domains"], []
    for row in summary["rows"][1:]:
        changes = sorted((ppl / dense[name] - 1, name) for name, ppl in row["domains"].items())
        if changes[0][0] <= -TIE and changes[-1][0] >= TIE:
            ends = ", ".join(f"{name} {signed(by)}" for by, name in (changes[-1], changes[0]))
            drifted.append(f"{row['stage']} ({ends})")
    if drifted:
        yield (
            "Some models drifted: they are worse than dense in one domain and better in another. "
            f"Worst and best domain: {'; '.join(drifted)}."
        )
    elif len(dense) < 2:
        yield "The test text is of one domain, so drift between domains cannot be seen."
    else:
        yield "No drift: no model is worse than dense in one domain and better in another."


def _spread(summary: Summary) -> Iterator[str]:
    row = max(summary["rows"], key=lambda row: (row["std"] or 0) / row["ppl"])
    if row["std"]:
        widest = f"± {number(row['std'])}, in {row['stage']}"
        yield f"Figures are means over {len(summary['seeds'])} seeds. The widest standard deviation is {widest}."
    else:
        reason = "One seed" if len(summary["seeds"]) == 1 else "No standard deviation over seeds"
        yield f"{reason}: the spread is not known, so differences under 1 % are called ties."
