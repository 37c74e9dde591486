"""What the literature has published on the combinations of TEST_MATRIX.md: a registry with a source for each line.

The matrix says what is tested here; this registry says what is known, so that a reader sees which of our results
repeat a published one and which are new. Two grades keep it honest:

* **same** (`arms`): the source trained with the arm's update rule, and its weights live where the arm's do (in a
  float32 master that the layers round, or on the grid), as far as its text says;
* **near** (`near`): the format agrees, but the rule, the place of the weights or the kind of layer does not, or the
  text that was read does not say; `differs` says which.

`read` says what was read of the source: an abstract supports less than a table. A result whose format is not in
`FORMATS` (fixed point of 16 bits, formats of 6 and 4 bits) is not listed. The grids of INT8 are E0M7's and E1M6's up
to a scale; INT8 training therefore counts for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Grade = Literal["same", "near"]

MLP = ("mlp.c_fc", "mlp.c_proj")
"""Where results of convolutional and plain feed-forward networks are listed; always as near cases."""
BLOCK = ("attn.c_attn", "attn.c_proj", *MLP)
EVERY = ("wte", *BLOCK, "lm_head")


@dataclass(frozen=True)
class Bearing:
    """The combinations that a result bears on: formats of the weights, layers by their short names, arms.

    `arms` are the same case, `near` the near ones. `policy` is the named policy that gives these layers the source's
    formats for weights, activations and gradients; None if there is none, or the text read does not say.
    """

    formats: tuple[str, ...]
    layers: tuple[str, ...]
    arms: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    policy: str | None = None

    def grade(self, format: str, arm: str, layer: str) -> Grade | None:
        """How close the result is to a combination; None if it says nothing of it."""
        if format not in self.formats or layer not in self.layers:
            return None
        return "same" if arm in self.arms else "near" if arm in self.near else None


@dataclass(frozen=True)
class PublishedResult:
    """One published result: what was trained in what numbers, what came of it, and where it bears on the matrix.

    `differs` says what is not as in the arm; a near case needs it.
    """

    source: str
    read: str
    bearing: Bearing
    trained: str
    tensors: str
    result: str
    differs: str


def bearing_on(format: str, arm: str, layer: str, grade: Grade) -> tuple[int, ...]:
    """Numbers (from 1, as in the table) of the results of a grade for one format, arm and short layer name."""
    return tuple(
        number for number, result in enumerate(PUBLISHED, start=1) if result.bearing.grade(format, arm, layer) == grade
    )


def mark(format: str, arm: str, layer: str) -> str:
    """What a cell carries: '[3, 7]' for the same case, '~[2]' for a near one, both or nothing."""
    same, near = (bearing_on(format, arm, layer, grade) for grade in ("same", "near"))
    return " ".join(sign + _bracket(numbers) for sign, numbers in (("", same), ("~", near)) if numbers)


def _bracket(numbers: Sequence[int]) -> str:
    return f"[{', '.join(map(str, numbers))}]"


PUBLISHED: tuple[PublishedResult, ...] = (
    PublishedResult(
        source="Wang et al. 2018, arXiv 1812.08011",
        read="abstract; formats from arXiv 2206.02915 §2.4",
        bearing=Bearing(("E5M2",), MLP, near=("adamw",), policy="uniform_full"),
        trained="a range of deep networks and data sets",
        tensors="weights, activations and gradients E5M2",
        result="first training in 8-bit floats with the accuracy of full precision",
        differs="weight updates in a 16-bit float, stochastically rounded; 16-bit chunked accumulation; not our layers",
    ),
    PublishedResult(
        source="Sun et al. 2019, NeurIPS 32 (HFP8)",
        read="abstract; formats from arXiv 2206.02915 §2.4",
        bearing=Bearing(("E4M3",), BLOCK, near=("adamw",), policy="uniform_full"),
        trained="image classification, detection, language and speech",
        tensors="weights and activations E4M3, gradients E5M2",
        result="no loss of accuracy",
        differs="optimizer and master weights not stated in what was read",
    ),
    PublishedResult(
        source="Sun et al. 2019, NeurIPS 32 (HFP8)",
        read="abstract",
        bearing=Bearing(("E5M2",), BLOCK, near=("adamw",), policy="uniform_full"),
        trained="MobileNet and Transformer",
        tensors="the earlier FP8 recipe (E5M2 throughout)",
        result="negative: significant degradation, traced to different needs of precision forward and back",
        differs="optimizer and master weights not stated in what was read",
    ),
    PublishedResult(
        source="Mellempudi et al. 2019, arXiv 1905.12334",
        read="abstract; format from two later papers that cite it",
        bearing=Bearing(("E5M2",), BLOCK, near=("adamw",), policy="uniform_full"),
        trained="ResNet-18/34/50 on ImageNet, GNMT and Transformer on WMT16",
        tensors="weights, activations, errors and gradients E5M2",
        result="validation accuracy slightly above full precision",
        differs="master weights of 16 bits; enhanced loss scaling; stochastic rounding; optimizer not read",
    ),
    PublishedResult(
        source="Noune et al. 2022, arXiv 2206.02915",
        read="full text: §3.4, Tables 8, 9, 12",
        bearing=Bearing(("E4M3",), BLOCK, arms=("adamw",), policy="uniform_full"),
        trained="Transformer base on WMT14 En-De (Adam), BERT-Large (AdamW)",
        tensors="weights and activations E4M3, gradients E5M2",
        result="BLEU 25.56 ± 0.23 against 25.58 ± 0.08 in float32; BERT test loss 2.22 against 2.19; with gradients in "
        "E4M3 the Transformer diverged in all cases",
        differs="exponent biases tuned by hand, one per kind of tensor; finite variant without infinities",
    ),
    PublishedResult(
        source="Noune et al. 2022, arXiv 2206.02915",
        read="full text: §3.4, Table 8, Figure 5",
        bearing=Bearing(("E5M2",), BLOCK, arms=("adamw",), policy="uniform_full"),
        trained="Transformer base on WMT14 En-De (Adam)",
        tensors="weights, activations and gradients E5M2",
        result="BLEU 25.48 ± 0.26 against 25.58 ± 0.08 in float32: no significant difference",
        differs="exponent biases tuned by hand, one per kind of tensor; finite variant without infinities",
    ),
    PublishedResult(
        source="Noune et al. 2022, arXiv 2206.02915",
        read="full text: §3.3, Table 3",
        bearing=Bearing(("E5M2",), MLP, near=("adamw",), policy="uniform_full"),
        trained="ResNet-18 on ImageNet, SGD with momentum",
        tensors="weights, activations and gradients E5M2; the first layer's input float32",
        result="negative: 69.95 ± 0.10 % against 70.35 ± 0.06 %, significant; E4M3 forward and E5M2 back: 70.29 %",
        differs="SGD with momentum; convolutions",
    ),
    PublishedResult(
        source="Noune et al. 2022, arXiv 2206.02915",
        read="full text: §3.3, Figures 2, 3 and 9 to 13 (plots only)",
        bearing=Bearing(("E0M7", "E2M5", "E3M4", "E6M1"), MLP, near=("adamw",)),
        trained="ResNet-32 on CIFAR-100, SGD with momentum",
        tensors="one kind of tensor at a time: weights, activations or gradients",
        result="gradients with respect to activations need at least 4 exponent bits; E0M7 cannot represent them, and "
        "holds weights and activations in a very narrow range of scales",
        differs="SGD with momentum; convolutions; only one kind of tensor quantized in a run",
    ),
    PublishedResult(
        source="Micikevicius et al. 2022, arXiv 2209.05433",
        read="abstract; quotations and a table of its results in two later texts",
        bearing=Bearing(("E4M3",), BLOCK, near=("adamw",), policy="uniform_full"),
        trained="GPT-3 of 126M to 175B parameters, CNNs, RNNs; hyperparameters of the 16-bit runs",
        tensors="inputs of matrix products: weights and activations E4M3, gradients of activations E5M2",
        result="perplexity 6.68 against 6.65 (175B), 7.24 against 7.21 (22B), 19.24 against 19.14 (126M)",
        differs="optimizer and master weights not stated in what was read",
    ),
    PublishedResult(
        source="Peng et al. 2023, arXiv 2310.18313 (FP8-LM)",
        read="abstract; the authors' code and documentation (MS-AMP) for formats",
        bearing=Bearing(("E4M3",), BLOCK, near=("adamw",)),
        trained="GPT up to 175B",
        tensors="weights, activations and weight gradients E4M3, gradients of activations E5M2",
        result="no loss of accuracy reported; 39 % less memory and 75 % faster than BF16 (175B)",
        differs="master weights FP16, first moment FP8, second moment FP16 at the highest level",
    ),
    PublishedResult(
        source="Lee et al. 2024, arXiv 2405.18710",
        read="abstract; public reviews of the submission; MS-AMP's code for formats",
        bearing=Bearing(("E4M3",), (*BLOCK, "lm_head"), near=("adamw",)),
        trained="GPT of nanoGPT with MS-AMP (level O1), with and without the head in FP8",
        tensors="weights and activations E4M3, gradients of activations E5M2",
        result="negative: does not reach BF16's loss; FP8 methods not robust enough over seeds and learning rates to "
        "replace BF16",
        differs="optimizer not stated in what was read; weights kept in 16 bits",
    ),
    PublishedResult(
        source="Fishman et al. 2024, arXiv 2409.12517",
        read="abstract; two reviews of the paper",
        bearing=Bearing(("E4M3",), BLOCK, near=("adamw",)),
        trained="Llama-2 7B, up to 2T tokens",
        tensors="weights and activations E4M3, gradients E5M2 (as in the earlier literature)",
        result="negative: diverges after 200B tokens through outliers at the input of the MLP's last layer; with "
        "Smooth-SwiGLU and FP8 moments on par with BF16",
        differs="SwiGLU; place of the master weights not stated in what was read",
    ),
    PublishedResult(
        source="DeepSeek-AI 2024, arXiv 2412.19437 (DeepSeek-V3)",
        read="full text of §3.3; a quotation of Appendix B.2",
        bearing=Bearing(("E4M3",), BLOCK, arms=("adamw",)),
        trained="mixtures of experts (two models, about 1T tokens each, against BF16); then 671B",
        tensors="inputs of all three products of linear layers E4M3, gradients too; head, embedding, norms, gating and "
        "attention products higher",
        result="loss within 0.25 % of BF16's; with gradients scaled by 128 × 128 blocks a 16B model diverged",
        differs="scales per 1 × 128 tile and 128 × 128 block; moments BF16",
    ),
    PublishedResult(
        source="Narayan et al. 2025, arXiv 2502.05967 (μnit scaling)",
        read="full text: §3.1, §3.2, Figure 7, Appendix A.1.2, A.5",
        bearing=Bearing(("E4M3",), BLOCK, near=("lion",), policy="uniform_full"),
        trained="decoders of 1B to 13B (Lion), 31B to 260B tokens",
        tensors="hidden layers: weights and activations E4M3, gradients E5M2; first and last layers higher",
        result="loss similar to BF16's up to 13B; standard parametrization with dynamic scales did not converge at "
        "13B, unit scaling diverged early at 7B",
        differs="weights not on the grid; static scales, unit-variance weights, another residual layout",
    ),
    PublishedResult(
        source="Sun et al. 2025, arXiv 2501.02423",
        read="full text: §3, §4.2, Table 3",
        bearing=Bearing(("E0M7", "E1M6", "E4M3", "E5M2", "E6M1", "BF16"), BLOCK, near=("adamw",)),
        trained="Llama decoders of 41M to 679M, 10B to 100B tokens, 366 runs; law checked up to 70B",
        tensors="weights (forward and back) and the activations of the weight gradient, to nearest; classifier not",
        result="by the fitted law E4M3 is the best layout of 8 bits and BF16 of 16; exponent bits matter slightly more",
        differs="scales per channel; optimizer not stated in what was read",
    ),
    PublishedResult(
        source="Mishra et al. 2025, arXiv 2506.08027",
        read="abstracts of both versions",
        bearing=Bearing(("E4M3",), BLOCK, near=("adamw",)),
        trained="decoders up to 8B, up to 15T tokens",
        tensors="MXFP8 with E4M3 elements",
        result="matches BF16; with the block scales rounded as the OCP specification suggests it can diverge",
        differs="a power-of-two scale per 32 elements; optimizer, layers, master weights not in what was read",
    ),
    PublishedResult(
        source="Karpathy 2026, nanochat experiment log, 2026-02-02",
        read="full text; the repository's fp8.py for formats",
        bearing=Bearing(("E4M3",), BLOCK, near=("muon",), policy="uniform_full"),
        trained="GPT of nanochat, depth 24 and 26, Muon on the matrices",
        tensors="all linear layers: weights and inputs E4M3, gradients E5M2, a scale per tensor",
        result="17 % more tokens/s, but each step is worth less: about 5 % at equal capability",
        differs="weights in a float32 master, not on the grid; a log, not a paper",
    ),
    PublishedResult(
        source="Karpathy 2026, nanochat experiment log, 2026-08-22",
        read="full text",
        bearing=Bearing(("BF16",), ("wte",), arms=("adamw_nearest",)),
        trained="GPT of nanochat, depth 12 to 28",
        tensors="embeddings BF16 without a master",
        result="updates below half an ULP were lost, most coordinates froze in the decay; losses differ within noise",
        differs="moments BF16; embedding not tied to the head; a log, not a paper",
    ),
    PublishedResult(
        source="Nikdan et al. 2026, arXiv 2601.22101 (ECO)",
        read="abstract; two detailed summaries",
        bearing=Bearing(("E4M3",), BLOCK, arms=("eco",)),
        trained="Transformers of 30M to 800M, Gemma-3 1B, a mixture of experts of 2.1B",
        tensors="weights E4M3, no master",
        result="near-lossless against master weights; up to 25 % less static memory",
        differs="scales per row; which layers were quantized was not read",
    ),
    PublishedResult(
        source="Nikdan et al. 2026, arXiv 2601.22101 (ECO)",
        read="abstract; two detailed summaries",
        bearing=Bearing(("E4M3",), BLOCK, near=("adamw_nearest", "adamw_sr")),
        trained="analysis; the naive removal of master weights is the paper's control",
        tensors="weights on the grid, no error feedback",
        result="negative: the stationary error can grow as 1 / learning rate, so that decay does not help",
        differs="proved for SGD with momentum",
    ),
    PublishedResult(
        source="Zhang et al. 2025, arXiv 2510.11168 (ELMO)",
        read="abstract; the authors' code and documentation",
        bearing=Bearing(("E4M3", "BF16"), ("lm_head",), near=("sgdm",), policy="uniform_act"),
        trained="classifiers with up to 8.6M labels",
        tensors="the head's weights E4M3 with scale 1 (or BF16), stochastically rounded; its inputs E4M3",
        result="competitive accuracy without master weights; 6.6 GiB against 39.7 GiB at 3M labels",
        differs="SGD without momentum; a classifier's head",
    ),
    PublishedResult(
        source="Zhao et al. 2024, arXiv 2412.04787 (DQT)",
        read="abstracts of versions 1 and 3; the authors' optimizer",
        bearing=Bearing(("E0M7", "E1M6"), BLOCK, arms=("adamw_sr",)),
        trained="Llama decoders of 130M to 1B (AdamW)",
        tensors="weights INT8, stochastically rounded after each step",
        result="on par with BitNet b1.58 (version 1: 5 % worse loss)",
        differs="the scale follows the weights' maximum each step; activations are quantized too",
    ),
    PublishedResult(
        source="Xi et al. 2024, arXiv 2403.12422 (Jetfire)",
        read="abstract",
        bearing=Bearing(("E0M7", "E1M6"), BLOCK, near=("adamw",)),
        trained="translation, image classification, language models",
        tensors="INT8 data flow through linear and other layers, a scale per block",
        result="accuracy comparable to FP16; a block 1.42 × faster with 1.49 × less memory",
        differs="scales per block; optimizer and master weights not stated in what was read",
    ),
    PublishedResult(
        source="Zhang et al. 2025, arXiv 2503.08040",
        read="abstract",
        bearing=Bearing(("E0M7", "E1M6"), BLOCK, near=("adamw",)),
        trained="Transformers with gated MLPs, fine-tuning and pretraining",
        tensors="INT8 with a scale per block",
        result="negative: block-wise INT8 works on GPT-2 but struggles with gated MLPs; blocks with outliers need "
        "16 bits",
        differs="scales per block; optimizer and master weights not stated in what was read",
    ),
    PublishedResult(
        source="Banner et al. 2018, arXiv 1805.11046",
        read="abstract; a review of the paper",
        bearing=Bearing(("E0M7", "E1M6"), MLP, near=("adamw",)),
        trained="ImageNet classifiers",
        tensors="weights, activations and layer gradients INT8; weight gradients from 16-bit copies",
        result="state-of-the-art accuracy of its time",
        differs="convolutions with range batch normalization; optimizer not read",
    ),
    PublishedResult(
        source="Bernstein et al. 2020, arXiv 2006.14560 (Madam)",
        read="abstract",
        bearing=Bearing(("E7M0",), BLOCK, near=("madam",)),
        trained="state-of-the-art architectures of its time",
        tensors="weights in a logarithmic number system",
        result="multiplicative updates train weights that live on a logarithmic grid",
        differs="a logarithmic number system of their own, not powers of two alone; widths not in the abstract",
    ),
    PublishedResult(
        source="Zhao et al. 2021, arXiv 2106.13914 (LNS-Madam)",
        read="abstract",
        bearing=Bearing(("E7M0",), BLOCK, near=("madam",)),
        trained="vision and language tasks",
        tensors="8-bit logarithmic number system; weights updated in low precision",
        result="accuracy comparable to full precision",
        differs="a logarithmic number system of their own, not powers of two alone",
    ),
    PublishedResult(
        source="Kalamkar et al. 2019, arXiv 1905.12322",
        read="abstract",
        bearing=Bearing(("BF16",), EVERY, near=("adamw",), policy="uniform"),
        trained="vision, speech, language, generative networks, recommendation",
        tensors="BF16 tensors in mixed precision",
        result="state-of-the-art results of FP32 in the same number of iterations, same hyperparameters",
        differs="each baseline's own optimizer",
    ),
    PublishedResult(
        source="Micikevicius et al. 2018, arXiv 1710.03740",
        read="two summaries of the paper",
        bearing=Bearing(("FP16",), EVERY, near=("adamw",), policy="uniform_full"),
        trained="CNNs, detectors, speech, translation, language models",
        tensors="weights, activations and gradients FP16, master weights FP32",
        result="ResNet-50 76.04 % against 75.92 % in FP32; without loss scaling SSD and a large LSTM diverge",
        differs="each baseline's own optimizer; loss scaling",
    ),
    PublishedResult(
        source="Zamirai et al. 2020, arXiv 2010.06192",
        read="abstract; a summary of the paper",
        bearing=Bearing(("BF16",), EVERY, near=("adamw_nearest", "adamw_sr"), policy="uniform"),
        trained="seven applications, among them ResNet, BERT and DLRM",
        tensors="BF16 alone, no master",
        result="to nearest, updates are cancelled; stochastic rounding or Kahan summation gain up to 7 points and end "
        "0.1 below to 0.2 above FP32",
        differs="each baseline's own optimizer; all state in BF16",
    ),
    PublishedResult(
        source="Ozkara et al. 2025, arXiv 2502.20566",
        read="abstract; a summary of the paper",
        bearing=Bearing(("BF16",), EVERY, arms=("adamw_sr",), policy="uniform"),
        trained="GPT-2 and GPT-Neo up to 6.7B (AdamW)",
        tensors="weights, gradients and moments BF16, no master",
        result="better perplexity than BF16 with FP32 masters; up to 1.54 × faster, 30 % less memory",
        differs="moments BF16",
    ),
    PublishedResult(
        source="Yu et al. 2024, arXiv 2405.03637 (Collage)",
        read="abstract; a summary of the paper",
        bearing=Bearing(("BF16",), EVERY, near=("eco",), policy="uniform"),
        trained="BERT, RoBERTa, GPT and OpenLLaMA-7B (AdamW)",
        tensors="BF16 with a second BF16 component that holds what rounding took",
        result="equal or better than with FP32 masters; up to 3.7 × faster, 15 to 23 % less memory",
        differs="the lost part is kept beside the weight instead of in the first moment",
    ),
)
