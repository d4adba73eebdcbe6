"""Plain words and number formats: how each finding is named, explained and written."""

from __future__ import annotations

from dataclasses import dataclass

DASH = "—"
NBSP = "\u00a0"


@dataclass(frozen=True)
class Metric:
    """How one finding is presented.

    Attributes:
        label: A few plain words.
        kind: ``percent`` (a fraction shown as percent), ``score`` (0 to 1, three decimals),
            ``seconds``, ``ratio`` or ``number`` (three significant digits).
        plain: One or two sentences for a reader who does not program.
        short: The field's own abbreviation, or nothing.
    """

    label: str
    kind: str
    plain: str
    short: str = ""


_JS = (
    "How far the model's answers on the {} are from those of a model retrained without the "
    "forgotten records: 0 means the same answers (Jensen–Shannon divergence)."
)

METRICS = {
    "ua": Metric(
        "Forgotten records answered wrongly",
        "percent",
        "The share of the forgotten records that the model no longer gets right. Neither high nor "
        "low is good: it should be what a model retrained without these records shows.",
        "UA",
    ),
    "ra": Metric(
        "Kept records answered correctly",
        "percent",
        "Accuracy on the training records that were kept. It should stay where retraining is.",
        "RA",
    ),
    "ta": Metric(
        "New records answered correctly",
        "percent",
        "Accuracy on test records that were never used for training: the model's usefulness.",
        "TA",
    ),
    "mia_efficacy": Metric(
        "Forgotten records that look unseen",
        "percent",
        "The share of the forgotten records that an attacker, trained to tell training records "
        "from new ones, takes for new. It should be what retraining shows. A switched-off output "
        "can fool this number; the next one it cannot.",
        "MIA-efficacy",
    ),
    "mia_auc": Metric(
        "Attacker tells forgotten from unseen",
        "score",
        "How well an attacker ranks forgotten records above records that were never used: 0.5 is "
        "guessing, 1 is certainty (area under the ROC curve).",
        "MIA AUC",
    ),
    "mia_tpr_at_1fpr": Metric(
        "Forgotten records an attacker is sure of",
        "percent",
        "The share of the forgotten records that an attacker recognises while accusing at most 1 % "
        "of the unseen records wrongly. Guessing gives 1 %.",
        "TPR at 1 % FPR",
    ),
    "margin_forget": Metric(
        "Confidence in the right answer, forgotten records",
        "number",
        "By how much the right answer is ahead of the best wrong one, on average over the "
        "forgotten records. Above the retrained models: traces are left. Below: more was erased "
        "than retraining erases, which can itself give the records away.",
        "margin",
    ),
    "accuracy_per_class": Metric(
        "Accuracy class by class",
        "percent",
        "Accuracy on new records of each class, to see whether forgetting damaged one of them.",
    ),
    "forget_class_test_accuracy": Metric(
        "New records of the forgotten class answered correctly",
        "percent",
        "Accuracy on test records of the forgotten class. A model that was never shown the class "
        "gets none of them right.",
        "Class TA",
    ),
    "js_forget": Metric(
        "Distance of answers, forgotten records", "number", _JS.format("forgotten records")
    ),
    "js_retain": Metric("Distance of answers, kept records", "number", _JS.format("kept records")),
    "js_test": Metric("Distance of answers, new records", "number", _JS.format("test records")),
    "weight_distance_original": Metric(
        "Distance of weights to the original model",
        "number",
        "How far the network's numbers moved (Euclidean distance). It says that something changed, "
        "not that anything was forgotten.",
    ),
    "weight_distance_reference": Metric(
        "Distance of weights to the retrained model",
        "number",
        "How far the network's numbers are from a retrained model's (Euclidean distance). Two "
        "retrained models are far apart too, so only the noise floor gives it a meaning.",
    ),
    "mask_iou": Metric(
        "Overlap of kept connections with retraining",
        "score",
        "The share of connections kept by both this model and one pruned after retraining, among "
        "those kept by either (intersection over union).",
        "mask IoU",
    ),
    "mask_iom": Metric(
        "Overlap, of the smaller choice",
        "score",
        "The same, among the connections that the sparser of the two keeps (intersection over "
        "minimum).",
        "mask IoM",
    ),
    "mask_iou_chance": Metric(
        "Overlap by chance",
        "score",
        "The overlap that two random choices of connections would have, with as many in each "
        "layer.",
    ),
    "mask_iou_initial": Metric(
        "Overlap of the largest initial weights",
        "score",
        "The overlap with retraining of a choice that saw no data at all: the connections that "
        "were largest before training. An overlap up to here is no trace of any record.",
    ),
    "mask_iou_ceiling": Metric(
        "Overlap between two retrained models",
        "score",
        "The overlap that two retrained models have with each other: more cannot be expected.",
    ),
    "mask_iou_other_init": Metric(
        "Overlap with retraining from other initial weights",
        "score",
        "The same with retrained models that began elsewhere: all that is to be seen without the "
        "initial weights.",
    ),
    "mask_trace": Metric(
        "Trace in the topology",
        "score",
        "How much more retrained models overlap with each other than with the original: what the "
        "forgotten records did to the choice of connections. The interval says whether it could be "
        "the chance of one training.",
        "ceiling − IoU before",
    ),
    "mask_trace_between": Metric(
        "Difference between models with and without the records",
        "score",
        "How much more models of one kind overlap with one another than with models of the other "
        "kind; 0 if the records leave nothing.",
    ),
    "mask_trace_removed": Metric(
        "Share of the trace removed",
        "percent",
        "How far the update moved the topology from the original's towards retraining's: 0 % not "
        "at all, 100 % as far as retraining does. Below 0 %: away from it.",
    ),
    "mask_membership": Metric(
        "Place between models with and without the records",
        "score",
        "Judged by the choice of connections alone: 0, like models that saw the records; 1, like "
        "models that did not.",
    ),
    "mask_membership_auc": Metric(
        "Topology tells who saw the records",
        "score",
        "How well the choice of connections alone ranks models without the records above models "
        "with them: 0.5 is guessing, 1 is certainty.",
        "mask AUC",
    ),
    "linear_probe": Metric(
        "A simple reader finds the class in the features",
        "percent",
        "How often a linear probe on what the last layer is given tells new records of the "
        "forgotten class from others: 50 % is guessing. It finds a part of any class in any "
        "network, so it should be what retraining shows.",
        "Linear probe",
    ),
    "relearn_retain": Metric(
        "The class comes back by itself",
        "percent",
        "The highest accuracy on new records of the forgotten class while a copy is trained on "
        "for a few passes over kept records only. A retrained model stays at zero.",
        "Relearning, D_r",
    ),
    "relearn_forget": Metric(
        "The class comes back from a few records",
        "percent",
        "The same with a few forgotten records among the kept ones, on average over the passes: "
        "the higher, the sooner the class is back. It should be what retraining shows.",
        "Relearning, D_f",
    ),
    "block_contrast": Metric(
        "Blocks tell the forgotten records from the rest",
        "number",
        "How differently the blocks of the network matter for the forgotten records and for the "
        "rest: the mean of |ln ratio|. Near what random records would show, there is no block to "
        "turn down for these records.",
    ),
    "rte_seconds": Metric(
        "Time to forget", "seconds", "Wall-clock time of the forgetting itself.", "RTE"
    ),
    "rte_ratio": Metric(
        "Time to forget, compared with retraining",
        "ratio",
        "The forgetting's time divided by retraining's on the same machine; below 1 is faster.",
    ),
    "probe": Metric(
        "Downstream records answered correctly",
        "percent",
        "Accuracy of a linear probe on the features of the network, on test records of classes "
        "that the network was never trained on.",
        "Probe",
    ),
    "kept_accuracy": Metric(
        "New records of kept classes",
        "percent",
        "Accuracy on test records of the source classes that were not forgotten.",
        "TA (kept)",
    ),
    "asr": Metric(
        "Attack success",
        "percent",
        "The share of test images with the trigger that the model answers with the attacker's "
        "class, among images of other classes.",
        "ASR",
    ),
    "asr_paper": Metric(
        "Attack success, all classes",
        "percent",
        "The same over all test images, the attacker's own class among them, as in Jia et al. "
        "(2023): a clean model has about a tenth, not zero.",
        "ASR (all)",
    ),
}

VERDICTS = {
    "indistinguishable": (
        "good",
        "✓",
        "On the forgotten records this model cannot be told from one retrained without them.",
    ),
    "under-forgotten": (
        "bad",
        "!",
        "The model still treats the forgotten records as something that it has seen.",
    ),
    "over-forgotten": (
        "warn",
        "▲",
        "The model erased more than retraining would, which can itself give the records away.",
    ),
    "not measurable": (
        "flat",
        "?",
        "Even the original model cannot be told from a retrained one here, so that no success of "
        "forgetting can be shown.",
    ),
}


def metric(name: str) -> Metric:
    """How a finding is presented; an unknown one under its own name, as a plain number.

    >>> metric("ua").short, metric("depth_of_trace").label
    ('UA', 'Depth of trace')
    """
    label = name.replace("_", " ")
    return METRICS.get(name) or Metric(label[:1].upper() + label[1:], "number", "")


def number(value: float | None, kind: str = "number", unit: bool = True) -> str:
    """One number as text; a dash for ``None``.

    >>> number(0.9312, "percent").replace(NBSP, " "), number(None), number(-0.04, "percent", False)
    ('93.1 %', '—', '−4.0')
    >>> number(0.64219, "score"), number(1234.5), number(200.0, "seconds").replace(NBSP, " ")
    ('0.642', '1,230', '3 min 20 s')
    """
    if value is None:
        return DASH
    if kind == "percent":
        return _minus(f"{round(100 * value, 1) + 0.0:.1f}") + (f"{NBSP}%" if unit else "")
    if kind == "score":
        return _minus(f"{round(value, 3) + 0.0:.3f}")
    if kind == "seconds":
        return seconds(value)
    return significant(value) + (f"{NBSP}×" if kind == "ratio" and unit else "")


def significant(value: float) -> str:
    """Three significant digits, with thousands separated and no exponent for usual sizes.

    >>> significant(0.012345), significant(-3.0), significant(48213.0), significant(1e-9)
    ('0.0123', '−3', '48,200', '1e-09')
    """
    text = f"{value:.3g}"
    return _minus(f"{float(text):,.0f}" if abs(value) >= 1000 else text)


def _minus(text: str) -> str:
    """The sign as a minus, which is as wide as a digit."""
    return "−" + text[1:] if text.startswith("-") else text


def seconds(value: float) -> str:
    r"""A duration as people say it.

    >>> seconds(0.42), seconds(12.34), seconds(7265.0)
    ('0.42\xa0s', '12.3\xa0s', '2\xa0h 1\xa0min')
    """
    if value < 90:
        return f"{significant(value)}{NBSP}s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60}{NBSP}s"
    return f"{whole // 3600}{NBSP}h {whole % 3600 // 60}{NBSP}min"


def interval(low: float | None, high: float | None, kind: str) -> str:
    """``[91.0, 94.8]``, or nothing when an end is missing."""
    if low is None or high is None:
        return ""
    return f"[{number(low, kind, False)}, {number(high, kind, False)}]"


def closeness(gap: float | None, floor: float | None, kind: str) -> tuple[str, str]:
    """The word and the CSS class of a gap.

    A gap at most the floor (how far retrained models are from each other) is "within noise". Beyond
    it, percents and scores are "close" up to 0.03, "apart" up to 0.10 and "far" after that; other
    units have no such scale and are "beyond noise".

    >>> closeness(0.02, 0.025, "percent"), closeness(0.02, None, "score")
    (('within noise', 'good'), ('close', 'good'))
    >>> closeness(0.2, 0.01, "percent"), closeness(5.0, 1.0, "number"), closeness(5, None, "number")
    (('far', 'bad'), ('beyond noise', 'warn'), ('', ''))
    """
    if gap is None:
        return "", ""
    if floor is not None and gap <= floor:
        return "within noise", "good"
    if kind not in ("percent", "score"):
        return ("beyond noise", "warn") if floor is not None else ("", "")
    if gap <= 0.03:
        return "close", "good"
    return ("apart", "warn") if gap <= 0.10 else ("far", "bad")
