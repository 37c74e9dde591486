"""How a report's numbers are computed: formulas with their sources, and what the study holds for."""

from __future__ import annotations

from altgrad.analysis.inference import ALPHA, BORROWED_ALPHA, FLIPS, LEAST_JOINT, LEAST_TO_BORROW, MOST_EXACT, POWER
from altgrad.analysis.sections import Group, Material, Section
from altgrad.analysis.wording import share

SOURCES = (
    "Berger 1982, Multiparameter hypothesis testing and acceptance sampling, Technometrics 24: 295–300.",
    "Box 1954, Some theorems on quadratic forms applied in the study of analysis of variance problems I, Annals of "
    "Mathematical Statistics 25: 290–302.",
    "Clopper & Pearson 1934, The use of confidence or fiducial limits illustrated in the case of the binomial, "
    "Biometrika 26: 404–413.",
    "Gupta 1965, On some multiple decision (selection and ranking) rules, Technometrics 7: 225–245.",
    "Holm 1979, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6: 65–70.",
    "Hsu 1984, Constrained simultaneous confidence intervals for multiple comparisons with the best, Annals of "
    "Statistics 12: 1136–1144.",
    "Lachin 1999, Worst-rank score analysis with informatively missing observations in clinical trials, Controlled "
    "Clinical Trials 20: 408–422.",
    "Schuirmann 1987, A comparison of the two one-sided tests procedure and the power approach for assessing the "
    "equivalence of average bioavailability, Journal of Pharmacokinetics and Biopharmaceutics 15: 657–680.",
    "Šidák 1967, Rectangular confidence regions for the means of multivariate normal distributions, Journal of the "
    "American Statistical Association 62: 626–633.",
    "Smyth 2004, Linear models and empirical Bayes methods for assessing differential expression in microarray "
    "experiments, Statistical Applications in Genetics and Molecular Biology 3, article 3.",
    "Westfall & Young 1993, Resampling-Based Multiple Testing, Wiley.",
)


def methods(material: Material) -> Section:
    """The formulas of the report, and the study's scope."""
    study, scope = material.study, str(material.trials["scope"].iloc[0])
    measure, unit = study.measure, study.unit
    facts = [
        (
            "Scope",
            f"{scope}; {len(study.cells)} cells of format, arm and policy, up to {study.pairs} seeds in common with "
            "BF16 AdamW. Nothing is said of other models, data, lengths or hardware.",
        ),
        (
            "Differences",
            f"Trials of a seed share initial weights and batches. With y the {measure} of a finished run ({unit}), a "
            "difference is d = Σ w·y over the cells compared, seed by seed: a format minus BF16 AdamW; a gain "
            "y(f, plain arm) − y(f, arm); an interaction, that gain minus the arm's gain in BF16, or minus that of the "
            "same steps over float32 weights.",
        ),
        (
            "Intervals",
            "mean ± max(t(ν, level) · s̃ / √n, t(n − 1, gate) · s / √n), with s̃² = (w s₀² + (n − 1) s²) / (w + n − "
            "1), w = min(d₀ / 2, 10 (n − 1)) and ν = min(w + n − 1, κ (n − 1)). The prior variance s₀² and its "
            "degrees of freedom d₀ are fitted to log s² of the family (Smyth 2004), of which half is borrowed; κ = "
            "(tr Σ)² / tr Σ² counts the family's independent variances (Box 1954). Families of fewer than "
            f"{LEAST_TO_BORROW} differences borrow nothing. The gate is the plain {share(1 - ALPHA)} t interval of one "
            "difference: none is shorter.",
        ),
        (
            "Families",
            f"Of m differences each has the level 1 − (1 − α)^(1/m) (Šidák 1967), α = {BORROWED_ALPHA:g} where "
            f"variances are borrowed and {ALPHA:g} elsewhere: simulated, the family's error then stays at {ALPHA:g}. "
            "Where gains have stopped seeds, intervals and stops take half of it each. A difference that is 0 in "
            "every seed is identical, and in no family.",
        ),
        (
            "Trains, fails",
            f"The interval of log(y / y of BF16 AdamW) against log(1 + {study.margin:g}): an arm trains below it, "
            "fails above it, by one-sided tests on either side (Schuirmann 1987), corrected over all arms where one "
            "arm is enough, over the formats where all arms have to agree (Berger 1982).",
        ),
        (
            "The best",
            "A pair of format and arm may gain most unless another is above it by more than the interval of their "
            "difference (Gupta 1965; Hsu 1984).",
        ),
        (
            "Stopped runs",
            "Two cells with stopped seeds are compared by a permutation test of stops, then of the ranks of the "
            "finished (worst ranks, Lachin 1999), exact up to 8 seeds each; p values are corrected by Holm (1979). "
            "Shares of runs that finish have exact intervals (Clopper & Pearson 1934).",
        ),
        (
            "Without a distribution",
            f"From {LEAST_JOINT} seeds on: max |t| over all flips of the signs of whole seeds, up to {MOST_EXACT} "
            f"seeds, over {FLIPS} drawn ones beyond (Westfall & Young 1993).",
        ),
        (
            "Seeds needed",
            f"Least n with a power of {share(POWER)} for the difference seen minus half a standard error, by the same "
            "interval.",
        ),
    ]
    return Section("Methods", Group.METHODS, facts=facts)


def sources(_: Material) -> Section:
    """What the methods are taken from."""
    return Section("Sources", Group.METHODS, items=SOURCES)
