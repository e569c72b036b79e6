"""A cascade run's figures in sentences: each is computed, none assumed, so a run that recovered nothing says so."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from sparsekd_ray.report.charts import Row, count, number, percent, signed

COLLAPSE, RECOVERED, PARITY = 5.0, 0.90, 1.05  # what a reproduction is expected to show
TIE = 0.01  # with one seed, smaller relative differences are called ties
NEAR = 0.01  # of the MLP parameters: students closer than this in sparsity are compared as of one size
KD, CE, KL = CONTROLS = ("Dense + KD", "CE only", "KL only")
MASKS = ("wanda", "magnitude")  # methods that zero weights and take none away


def change(row: Row, base: Row) -> float:
    """Relative difference in perplexity; below 0, `row` is better."""
    return row["ppl"] / base["ppl"] - 1


def verdict(row: Row, base: Row) -> str:
    """Better, worse or a tie: within 1 % with one seed, within both standard deviations with several."""
    margin = ((row["std"] or 0) + (base["std"] or 0)) / base["ppl"] or TIE
    return "a tie" if abs(change(row, base)) < margin else "better" if row["ppl"] < base["ppl"] else "worse"


def compared(row: Row, base: Row) -> str:
    return f"{signed(change(row, base))}, {verdict(row, base)}"


def has_excess(row: Row, base: Row) -> bool:
    """Whether pruning left more than a tie above `base`; otherwise the share recovered means nothing."""
    return row["pre_ppl"] is not None and row["pre_ppl"] > base["ppl"] * (1 + TIE)


def of_kind(summary: Row, kind: str) -> list[Row]:
    """The rows of a kind, by growing sparsity."""
    return sorted((row for row in summary["rows"] if row["kind"] == kind), key=lambda row: row["sparsity"])


def students(summary: Row) -> list[Row]:
    """What was pruned and distilled: the rounds, then the students of other methods beside them."""
    return of_kind(summary, "round") + of_kind(summary, "baseline")


def sized(row: Row) -> str:
    """A student's name with its sparsity, which the name of one beside the rounds states already."""
    return row["stage"] if row["kind"] == "baseline" else f"{row['stage']} ({percent(row['sparsity'], 0)})"


Check = tuple[str, bool | None, str]  # figure, whether it is as expected (None: not measured), sentence


def expectations(summary: Row) -> list[dict[str, Any]]:
    """What a reproduction should show, beside what this run shows: name, expected, figure, held, finding."""
    dense, rounds = summary["rows"][0], of_kind(summary, "round")
    named = {
        ("Collapse without training", f"at least {COLLAPSE:g} × dense"): _collapse(dense, rounds),
        ("Least recovered in a round", f"at least {percent(RECOVERED, 0)}"): _recovery(dense, rounds),
        ("At the smallest sparsity", f"at most {PARITY:g} × dense"): _parity(dense, rounds),
    }
    found = []
    for (name, expected), (figure, held, finding) in named.items():
        finding = f"Not as expected ({expected}): {finding}" if held is False else finding
        found.append({"name": name, "expected": expected, "figure": figure, "held": held, "finding": finding})
    return found


def _collapse(dense: Row, rounds: Sequence[Row]) -> Check:
    measured = [row for row in rounds if row["oneshot_ppl"] is not None]
    if not measured:
        return "–", None, "The collapse of plain SVD without training was not measured."
    row, ratio = measured[-1], measured[-1]["oneshot_ppl"] / dense["ppl"]
    text = f"Plain SVD at {percent(row['sparsity_requested'], 0)} sparsity, without training, has perplexity "
    text += f"{number(row['oneshot_ppl'])}: {number(ratio)} × dense ({number(dense['ppl'])})."
    return f"{number(ratio)} ×", ratio >= COLLAPSE, text


def _recovery(dense: Row, rounds: Sequence[Row]) -> Check:
    known = sorted((row for row in rounds if has_excess(row, dense)), key=lambda row: row["recovered"])
    idle = [row for row in rounds if row["pre_ppl"] is not None and not has_excess(row, dense)]
    moves = ", ".join(f"{row['stage']} ({number(row['pre_ppl'])} → {number(row['ppl'])})" for row in idle)
    note = f" Nothing to recover, at most 1 % above dense after pruning: {moves}." if idle else ""
    if not known:
        return "–", None, f"No round had a measured excess over dense to recover.{note}"
    shares = ", ".join(f"{row['stage']} {percent(row['recovered'])}" for row in known)
    beyond = " (above 100 %: better than dense)" if known[-1]["recovered"] > 1 else ""
    text = f"Share of the excess over dense that distillation recovered, least first: {shares}{beyond}.{note}"
    return percent(known[0]["recovered"]), known[0]["recovered"] >= RECOVERED, text


def _parity(dense: Row, rounds: Sequence[Row]) -> Check:
    if not rounds:
        return "–", None, "There was no round of pruning."
    row, ratio = rounds[0], rounds[0]["ppl"] / dense["ppl"]
    text = f"{sized(row)}, the smallest sparsity, ends at perplexity {number(row['ppl'])}: "
    return f"{number(ratio)} ×", ratio <= PARITY, f"{text}{number(ratio)} × dense ({compared(row, dense)})."


def findings(summary: Row) -> list[str]:
    """What the figures say, in sentences. An expectation that does not hold is said plainly."""
    parts = (_sizes, _order, _controls, _unmoved, _attribution, _students, _baselines, _drift, _spread)
    sentences = [check["finding"] for check in expectations(summary)]
    return sentences + [sentence for part in parts for sentence in part(summary)]


def _sizes(summary: Row) -> Iterator[str]:
    pruned = students(summary)
    misses = [(abs(row["sparsity"] - row["sparsity_requested"]), row["stage"]) for row in pruned]
    far = ", ".join(f"{stage} by {percent(miss, 2)}" for miss, stage in misses if miss > 0.001)
    if far:
        yield f"Sizes miss the request by more than 0.1 % of the MLP parameters: {far}."
    elif misses:
        widest = percent(max(misses)[0], 2)
        yield f"Every student has the requested size to within {widest} of the MLP parameters."


def _order(summary: Row) -> Iterator[str]:
    rounds = of_kind(summary, "round")
    falls = [(a, b) for a, b in pairwise(rounds) if verdict(b, a) == "better"]
    for a, b in falls:
        yield f"Not monotone: {sized(b)} at {number(b['ppl'])} beats {sized(a)} at {number(a['ppl'])}."
    if len(rounds) > 1 and not falls:
        listed = ", ".join(f"{number(row['ppl'])} at {percent(row['sparsity'], 0)}" for row in rounds)
        yield f"After distillation perplexity rises with sparsity, ties aside: {listed}."


def shift(summary: Row, row: Row, domains: Sequence[str]) -> float:
    """Change in log-perplexity from dense to `row`, summed over the test tokens of `domains`."""
    about, dense = summary["corpus"]["domains"], summary["rows"][0]["domains"]
    return math.fsum(about[d]["test_tokens"] * math.log(row["domains"][d] / dense[d]) for d in domains)


def domains_of(summary: Row, seen: bool | None) -> list[str]:
    """The evaluated domains that were in dense training, that were not, or (None) where it is not known."""
    about = summary["corpus"]["domains"]
    return [d for d in summary["rows"][0]["domains"] if about[d]["in_dense_training"] is seen]


def _controls(summary: Row) -> Iterator[str]:
    dense, controls, about = summary["rows"][0], of_kind(summary, "control"), summary["corpus"]["domains"]
    if not controls:
        return
    each = (f"{row['stage']} {number(row['ppl'])} ({compared(row, dense)})" for row in controls)
    yield f"Controls, trained at full size, against dense at {number(dense['ppl'])}: {'; '.join(each)}."
    fresh, known = domains_of(summary, False), domains_of(summary, True)
    if fresh and known:
        for domains, where in ((fresh, "never seen in dense training"), (known, "seen in it")):
            total = sum(about[d]["test_tokens"] for d in domains)
            means = [(row["stage"], math.expm1(shift(summary, row, domains) / total)) for row in controls]
            listed = ", ".join(f"{stage} {signed(mean)}" for stage, mean in means)
            yield f"On {', '.join(domains)}, {where}: {listed}."


def _unmoved(summary: Row) -> Iterator[str]:
    """Stages whose kept weights are those they began with: their figure is no figure of training."""
    for curve in summary["curves"]:
        later = [point["valid_ppl"] for point in curve["points"] if point["step"] > 0]
        if curve["best_step"] == 0 and later:
            start, best = number(curve["points"][0]["valid_ppl"]), number(min(later))
            yield (
                f"{curve['stage']} (seed {curve['seed']}) was at its best on validation text before its first step "
                f"({start}; at best {best} after it): the weights it started from were kept, and its figure is theirs."
            )


def _attribution(summary: Row) -> Iterator[str]:
    """Where the gain of Dense + KD comes from: through which of its two signals, and in which text."""
    dense, by_stage = summary["rows"][0], {row["stage"]: row for row in of_kind(summary, "control")}
    missing = [stage for stage in CONTROLS if stage not in by_stage]
    if missing:
        yield f"Where a gain comes from cannot be said without every control; missing: {', '.join(missing)}."
        return
    both = by_stage[KD]
    if verdict(both, dense) != "better":
        yield f"No gain to attribute: {KD} is no better than dense ({compared(both, dense)})."
        return
    alone = tuple(stage for stage in (CE, KL) if verdict(by_stage[stage], dense) == "better")
    signal = {
        (CE,): "cross-entropy, not self-distillation",
        (KL,): "self-distillation, not cross-entropy",
        (CE, KL): "either signal",
        (): "the two signals together, for neither gains alone",
    }[alone]
    gain = {stage: math.log1p(change(row, dense)) for stage, row in by_stage.items()}
    shares = "".join(f"; {stage} has {percent(gain[stage] / gain[KD], 0)} of it" for stage in alone)
    yield f"The gain of {KD} comes through {signal}{shares}."
    yield f"The teacher's KL on top of cross-entropy, {KD} against {CE}: {compared(both, by_stage[CE])}."
    fresh = domains_of(summary, False)
    if domains_of(summary, None):
        yield "Which domains the dense model was trained on is not known: new text cannot be told from known."
        return
    if not fresh:
        yield "Every domain was in dense training: the gain is more training on known text, not new text."
        return
    total = shift(summary, both, list(dense["domains"]))
    if total < 0:
        part = shift(summary, both, fresh) / total
        share = "More than all" if part > 1 else percent(part, 0)
        what = "mostly new text learnt" if part >= 0.5 else "mostly a better fit to text the dense model knew"
        yield f"{share} of that gain, in log-perplexity, lies in {', '.join(fresh)}: it is {what}."


def _students(summary: Row) -> Iterator[str]:
    controls, pruned = of_kind(summary, "control"), students(summary)
    if not controls or not pruned:
        return
    base = next((row for row in controls if row["stage"] == KD), controls[0])
    listed = "; ".join(f"{sized(row)} {compared(row, base)}" for row in pruned)
    yield f"Against {base['stage']}, which learnt from the same text at full size: {listed}."
    excess = [row for row in pruned if has_excess(row, base)]
    parts = [(row["pre_ppl"] - row["ppl"]) / (row["pre_ppl"] - base["ppl"]) for row in excess]
    if parts:
        listed = ", ".join(f"{row['stage']} {percent(part)}" for row, part in zip(excess, parts, strict=True))
        yield f"Recovered, with {base['stage']} as the floor in place of dense: {listed}."
    ratios = [(row["trained_tokens"] / max(base["trained_tokens"], 1), row["stage"]) for row in pruned]
    longer = ", ".join(f"{stage} on {ratio:.1f} ×" for ratio, stage in ratios if abs(ratio - 1) > TIE)
    if longer:
        amount = f"the {count(base['trained_tokens'])} tokens of {base['stage']}"
        yield f"That is not at equal compute: cumulatively, {longer} {amount}."


def _baselines(summary: Row) -> Iterator[str]:
    """Each student of another method against the rounds that removed about as much."""
    for row in of_kind(summary, "baseline"):
        rounds = [r for r in of_kind(summary, "round") if abs(r["sparsity"] - row["sparsity"]) <= NEAR]
        each = [f"against {_against(row, round_)}" for round_ in rounds]
        alone = f"no round has about its sparsity, {percent(row['sparsity'])}"
        yield (
            f"{row['stage']}, the dense model pruned once ({row['method']}) and distilled once, ends at perplexity "
            f"{number(row['ppl'])}; {'; '.join(each) or alone}."
        )


def _against(row: Row, round_: Row) -> str:
    """`row` against a round of about its size, and whether that is at equal compute."""
    ratio = row["trained_tokens"] / max(round_["trained_tokens"], 1)
    of = f"the {count(round_['trained_tokens'])} tokens of {round_['stage']}"
    compute = (
        f"not at equal compute: on {ratio:.2f} × {of}" if abs(ratio - 1) > TIE else f"at equal compute, {of}"
    )
    about = (
        f"{round_['stage']} ({percent(round_['sparsity'], 0)}, {round_['method']}) at {number(round_['ppl'])}"
    )
    return f"{about}: {compared(row, round_)}, {compute}"


def _drift(summary: Row) -> Iterator[str]:
    dense, found = summary["rows"][0]["domains"], []
    for row in summary["rows"][1:]:
        moved = sorted((ppl / dense[name] - 1, name) for name, ppl in row["domains"].items())
        if moved[0][0] <= -TIE and moved[-1][0] >= TIE:
            ends = ", ".join(f"{name} {signed(by)}" for by, name in (moved[-1], moved[0]))
            found.append(f"{row['stage']} ({ends})")
    if found:
        yield f"Drift against dense, which a mean hides; worst and best domain: {'; '.join(found)}."
    elif len(dense) < 2:
        yield "With one domain, drift between domains cannot be seen."
    else:
        yield "No drift: no model is worse than dense in one domain and better in another."


def _spread(summary: Row) -> Iterator[str]:
    row = max(summary["rows"], key=lambda row: (row["std"] or 0) / row["ppl"])
    if row["std"]:
        widest = f"± {number(row['std'])}, in {row['stage']}"
        yield f"Means over {len(summary['seeds'])} seeds; the widest standard deviation is {widest}."
    else:
        reason = "One seed" if len(summary["seeds"]) == 1 else "No standard deviation over seeds"
        yield f"{reason}: the spread is not known, so differences under 1 % are called ties."


def headline(summary: Row) -> str:
    dense, rounds = summary["rows"][0], of_kind(summary, "round")
    start = f"dense model of {count(dense['params'])} parameters at perplexity {number(dense['ppl'])}"
    if not rounds:
        end = "there was no round of pruning" if of_kind(summary, "baseline") else "nothing was pruned"
        return f"A {start}; {end}."
    last, plural = rounds[-1], "s" if len(rounds) > 1 else ""
    gone = "held at zero" if last["method"] in MASKS else "removed"
    end = f"{count(last['params'])} with {percent(last['sparsity'], 0)} of its MLP parameters {gone}"
    ppl = f"perplexity {number(last['ppl'])} ({signed(change(last, dense))})"
    return f"From a {start}, {len(rounds)} round{plural} of pruning and distillation lead to {end}, at {ppl}."
