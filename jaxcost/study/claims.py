"""The claims themselves: what papers say of pruning, factors, adapters, quantisation, distillation, augmentation and
their order.

How the sides of each are measured is in `sides`, by its name.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Sequence

from jaxcost.study import sides
from jaxcost.study.bench import Bench
from jaxcost.study.relations import NotRun, Relation, chosen, reproduce

SCORE = "bits per byte"
ERROR = "relative error of a layer's output"
WRONG = "share of held-out texts whose label is told wrong"

CLAIMS: tuple[Relation | NotRun, ...] = (
    Relation(
        "magnitude_over_random",
        "At 80 % and equal recovery, magnitude pruning beats random masks",
        "Han et al. 2015, arXiv:1506.02626",
        ("magnitude", "random"),
        SCORE,
        sides.magnitude_over_random,
    ),
    Relation(
        "gradual_over_one_shot",
        "At 80 % and equal steps, a cubic rise of the sparsity is no worse than pruning at once",
        "Zhu and Gupta 2017, arXiv:1710.01878",
        ("gradual", "one shot"),
        SCORE,
        sides.gradual_over_one_shot,
    ),
    Relation(
        "rigl_over_static",
        "From new weights at 90 % by Erdős-Rényi densities, RigL beats a static random mask at equal steps",
        "Evci et al. 2019, arXiv:1911.11134",
        ("RigL", "static"),
        SCORE,
        sides.rigl_over_static,
    ),
    Relation(
        "movement_over_magnitude",
        "At 95 % while fine-tuning on other text, movement pruning beats magnitude pruning on one schedule",
        "Sanh et al. 2020, arXiv:2005.07683",
        ("movement", "magnitude"),
        SCORE,
        sides.movement_over_magnitude,
    ),
    Relation(
        "pruned_layer",
        "With correlated inputs and outlier channels, SparseGPT ≤ Wanda ≤ magnitude per output, at 50 %",
        "Frantar and Alistarh 2023, arXiv:2301.00774; Sun et al. 2023, arXiv:2306.11695",
        ("SparseGPT", "Wanda", "magnitude"),
        ERROR,
        lambda bench, seed: sides.pruned_layer(seed, "anisotropic"),
    ),
    Relation(
        "wanda_needs_outliers",
        "With independent inputs of one size, Wanda does not beat magnitude",
        "our own measurement",
        ("magnitude", "Wanda"),
        ERROR,
        lambda bench, seed: sides.pruned_layer(seed, "iid"),
        tolerance=0.01,
        null=True,
    ),
    NotRun(
        "llama2_7b_at_half",
        "Llama-2-7B's perplexity at 50 %: dense 5.12, magnitude 14.89, SparseGPT 6.51, Wanda 6.42",
        "Sun et al. 2023, arXiv:2306.11695",
        "needs the weights of Llama-2-7B and an accelerator",
    ),
    Relation(
        "whitened_over_plain",
        "With outlier channels, activation-whitened factors beat the plain SVD's at equal rank",
        "Wang et al. 2024, arXiv:2403.07378",
        ("whitened", "plain"),
        ERROR,
        sides.whitened_over_plain,
    ),
    Relation(
        "lora_near_full",
        "Learning rates swept for each, LoRA comes within 5 % of the full fine-tune",
        "Hu et al. 2021, arXiv:2106.09685",
        ("LoRA", "full fine-tune"),
        SCORE,
        sides.lora_near_full,
        tolerance=0.05,
    ),
    Relation(
        "lora_holds_less",
        "A LoRA step holds fewer bytes of weights and moments than the full fine-tune's",
        "Hu et al. 2021, arXiv:2106.09685",
        ("LoRA", "full fine-tune"),
        "bytes of the step's arguments, compiled",
        sides.lora_holds_less,
    ),
    Relation(
        "lora_computes_less",
        "Frozen weights skip their gradients: a LoRA step computes less",
        "Hu et al. 2021, arXiv:2106.09685",
        ("LoRA", "full fine-tune"),
        "FLOPs of the step, compiled",
        sides.lora_computes_less,
    ),
    Relation(
        "dora_over_lora",
        "DoRA beats LoRA at one rank, learning rate and number of steps",
        "Liu et al. 2024, arXiv:2402.09353",
        ("DoRA", "LoRA"),
        SCORE,
        sides.dora_over_lora,
    ),
    Relation(
        "gptq_over_nearest",
        "With correlated inputs, GPTQ beats rounding to nearest at int4",
        "Frantar et al. 2022, arXiv:2210.17323",
        ("GPTQ", "nearest"),
        ERROR,
        sides.gptq_over_nearest,
    ),
    Relation(
        "gptq_gains_with_correlation",
        "The more the inputs correlate, the more GPTQ gains",
        "Frantar et al. 2022, arXiv:2210.17323",
        ("correlation 0.9", "correlation 0.5", "correlation 0"),
        "error of GPTQ over that of rounding to nearest, int4",
        sides.gptq_gains_with_correlation,
    ),
    Relation(
        "smoothing_with_outliers",
        "With outlier channels, SmoothQuant beats naive W8A8",
        "Xiao et al. 2022, arXiv:2211.10438",
        ("smoothed", "naive"),
        ERROR,
        sides.smoothing_with_outliers,
    ),
    Relation(
        "smoothing_is_exact",
        "By itself, smoothing leaves the output as it is",
        "Xiao et al. 2022, arXiv:2211.10438",
        ("smoothed", "one in 100000"),
        ERROR,
        sides.smoothing_is_exact,
    ),
    Relation(
        "trained_quantised_over_rounded",
        "At equal further steps, int4 training beats rounding to int4 afterwards",
        "Jacob et al. 2018, arXiv:1712.05877",
        ("trained", "rounded"),
        SCORE,
        sides.trained_quantised_over_rounded,
    ),
    Relation(
        "nf4_over_int4",
        "On Gaussian weights, NF4 errs less than int4 in groups of 64",
        "Dettmers et al. 2023, arXiv:2305.14314",
        ("NF4", "int4"),
        "relative error of the weights",
        sides.nf4_over_int4,
    ),
    Relation(
        "int8_training_is_free",
        "From new weights, int8 training of the blocks comes within 1 % of bfloat16's",
        "AQT, github.com/google/aqt",
        ("int8", "bf16"),
        SCORE,
        sides.int8_training_is_free,
        tolerance=0.01,
    ),
    Relation(
        "teacher_over_none",
        "A student of half the layers learns more with its teacher than without, at equal steps",
        "Hinton, Vinyals and Dean 2015, arXiv:1503.02531",
        ("taught", "alone"),
        SCORE,
        sides.teacher_over_none,
    ),
    Relation(
        "augmentation_of_few",
        "From new weights with 500 labels, changed copies of the texts make a classifier better",
        "Wei and Zou 2019, arXiv:1901.11196",
        ("augmented", "as they are"),
        WRONG,
        lambda bench, seed: sides.augmentation(bench, seed, labels=500),
    ),
    Relation(
        "augmentation_of_all",
        "With all 4000 labels, they do not",
        "Wei and Zou 2019, arXiv:1901.11196",
        ("as they are", "augmented"),
        WRONG,
        lambda bench, seed: sides.augmentation(bench, seed, labels=4000),
        null=True,
    ),
    NotRun(
        "augmentation_of_pretrained",
        "Changed copies do not make a pretrained transformer better",
        "Longpre et al. 2020, arXiv:2010.01764",
        "needs the weights of a pretrained transformer and labelled text of people",
    ),
    Relation(
        "unmerging_changes_weights",
        "An adapter that was merged in bfloat16 and taken out again leaves other weights",
        "our own measurement",
        ("never merged", "merged and unmerged"),
        "share of the weights that changed",
        sides.unmerging_changes_weights,
    ),
    Relation(
        "merging_into_nf4_loses_the_update",
        "A small update that is merged into NF4 and rounded again is lost",
        "our own measurement",
        ("served unmerged", "merged"),
        "share of the update that is lost",
        sides.merging_into_nf4_loses_the_update,
    ),
    Relation(
        "merging_ends_sparsity",
        "Merging an adapter ends 2:4 sparsity unless it is masked",
        "arithmetic",
        ("masked", "merged whole"),
        "share of the weights that are not zero",
        sides.merging_ends_sparsity,
    ),
    Relation(
        "gptq_keeps_masks",
        "GPTQ keeps the zeros of a pruned layer if it is told of the mask, and not otherwise",
        "arithmetic",
        ("told of the mask", "not told"),
        "share of the pruned weights that come back",
        sides.gptq_keeps_masks,
    ),
    Relation(
        "bisection_over_sorting",
        "Finding a sharded matrix's threshold by bisection exchanges less than sorting it",
        "arithmetic",
        ("bisection", "sorting"),
        "bytes that a device sends, compiled for two",
        sides.bisection_over_sorting,
    ),
)
"""Every claim, in the order of the table."""


def measure_at_once(bench: Bench, names: Sequence[str], seeds: Sequence[int], processes: int) -> None:
    """Measures claims in so many processes at once, for `reproduce` to read from the bench's folder.

    Each takes seeds of its own, since the claims of one seed share trainings. A single training of a model as small as
    the bench's hardly uses more than one core.

    Args:
      bench: where, and how large.
      names: of the claims; all if none are given.
      seeds: see `reproduce`, which says what can go wrong too.
      processes: at most as many as there are seeds are of use.
    """
    # JAX's threads do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawn) as pool:
        for done in [pool.submit(_measure, bench.workdir, bench.config, names, seed) for seed in seeds]:
            done.result()


def _measure(workdir, config, names, seed) -> None:
    reproduce(Bench(workdir, config), list(chosen(CLAIMS, names)), (seed,))
