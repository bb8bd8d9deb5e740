"""What a paper can be said to do: independent facets with closed lists of values.

The first eight follow the scheme of "An Attentive Survey of Attention Models" (arXiv:1904.02874) and its tables of
alignment and distribution functions, extended by the values that this catalogue needs; the others are its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, get_args, get_origin, get_type_hints

# What the code of the paper is.
Kind = StrEnum("Kind", "layer model explainer accelerator controller objective study")

# What the paper's experiments are about.
Domain = StrEnum(
    "Domain",
    {
        "cnn": "cnn",
        "detection": "detection",
        "diffusion": "diffusion",
        "document": "document",
        "geometry": "geometry",
        "graph": "graph",
        "interpretability": "interpretability",
        "language_vision": "language-vision",
        "medical": "medical",
        "restoration": "restoration",
        "saliency": "saliency",
        "segmentation": "segmentation",
        "sequence": "sequence",
        "vision": "vision",
        "vlm": "vlm",
    },
)

# Where queries and keys come from; for explainers and controllers, those of the map that they read.
Sequences = StrEnum("Sequences", "distinctive co self none")

# Attention at one level of abstraction, or stacked over several (words and sentences, a pyramid).
Levels = StrEnum("Levels", "single multi")

# All positions, a window of them, or a sampled, top-k or straight-through subset; not the same as the support.
Positions = StrEnum("Positions", "soft local hard")

# One embedding, weights over several embeddings of one input, or a weight for each feature; heads do not count.
Representations = StrEnum("Representations", "single multi_representational multi_dimensional")

# How a query and a key make a score.
Alignment = StrEnum(
    "Alignment",
    "similarity dot scaled_dot general biased_general activated_general kernel concat additive deep location feature "
    "euclidean relational predicted_kernel learned_static learned_mlp_lowdim none",
)

# How scores become weights.
Distribution = StrEnum(
    "Distribution",
    "softmax sigmoid sparsemax entmax15 entmax_alpha relu relu_squared standardize l1 sinkhorn hard_sample gumbel "
    "topk_softmax identity",
)

# The networks it sits in; the transformers among them (vit, llm, vlm, diffusion_transformer) are "transformer" too.
Architecture = StrEnum(
    "Architecture",
    "encoder_decoder transformer memory_network graph_attention rnn cnn cnn_hybrid vit diffusion_unet "
    "diffusion_transformer vlm llm detector_head segmenter_head matcher nerf_renderer",
)

# What it is used for: the survey's five, and the domains of this catalogue.
Application = StrEnum(
    "Application",
    {
        "nlg": "nlg",
        "classification": "classification",
        "recommendation": "recommendation",
        "interpretability": "interpretability",
        "multimodal": "multimodal",
        "cnn": "cnn",
        "detection": "detection",
        "diffusion": "diffusion",
        "document": "document",
        "geometry": "geometry",
        "graph": "graph",
        "language_vision": "language-vision",
        "medical": "medical",
        "restoration": "restoration",
        "saliency": "saliency",
        "segmentation": "segmentation",
        "sequence": "sequence",
        "vision": "vision",
        "vlm": "vlm",
    },
)

# What is weighed: "space" where the arrangement on a grid matters, "token" for a set or a line.
Axis = StrEnum("Axis", "token space channel time depth head modality edge view")

# Which keys a query can reach.
Support = StrEnum(
    "Support",
    "full window dilated block_static block_dynamic topk hash_or_cluster low_rank recurrent_state pooled_tokens graph "
    "mask_given",
)

# How weights and values become an output; "none" where the method only reads.
Aggregate = StrEnum("Aggregate", "convex_sum unnormalised_sum gated_elementwise conv max relation_plus_symbol none")

# How positions enter.
PositionInfo = StrEnum(
    "PositionInfo", "none absolute relative_bias relative_qk rotary conditional_conv camera_pose box_geometry"
)

# What becomes of the function of the model that it is put in; an explainer leaves it as it is.
Exactness = StrEnum("Exactness", "exact_same_function bounded_approx heuristic_approx new_function")

# How work grows with N tokens: W window, K kept tokens, M latents, queries or words whose number does not grow.
Cost = StrEnum(
    "Cost",
    {
        "N2": "N2",
        "N2_lower_const": "N2_lower_const",
        "NW": "NW",
        "NK": "NK",
        "NlogN": "NlogN",
        "N": "N",
        "NM": "NM",
    },
)

# What a decoder carries from step to step.
State = StrEnum(
    "State",
    {
        "kv_N": "kv_N",
        "kv_reduced": "kv_reduced",
        "kv_window": "kv_window",
        "constant": "constant",
        "none": "none",
    },
)

# What has to be trained before it works.
Training = StrEnum("Training", "from_scratch continue_tune calibrate train_small_adapter training_free")

# The quantities that it changes or reads.
Touches = StrEnum(
    "Touches",
    "query key score mask weight value head_output residual token_set kv_cache latent logit gradient loss",
)

# How an explanation is made, where one is shown to a person or scored; weights that steer a method explain nothing.
Interpretation = StrEnum("Interpretation", "none reads_weights reads_gradients perturbs decomposes_output")


@dataclass(frozen=True)
class Facets:
    """The facets of one paper; a tuple holds one value or more, ``host`` is free text, empty where there is none."""

    sequences: Sequences
    levels: Levels
    positions: Positions
    representations: Representations
    alignment: tuple[Alignment, ...]
    distribution: Distribution
    architecture: tuple[Architecture, ...]
    application: tuple[Application, ...]
    axis: tuple[Axis, ...]
    support: Support
    aggregate: Aggregate
    position_info: tuple[PositionInfo, ...]
    exactness: Exactness
    cost: Cost
    state: State
    training: Training
    touches: tuple[Touches, ...]
    host: str
    causal_ok: bool
    differentiable: bool
    stochastic: bool
    interpretation: Interpretation


_TYPES = get_type_hints(Facets)
SINGLE: dict[str, type[StrEnum]] = {k: t for k, t in _TYPES.items() if isinstance(t, type) and issubclass(t, StrEnum)}
MULTIPLE: dict[str, type[StrEnum]] = {k: get_args(t)[0] for k, t in _TYPES.items() if get_origin(t) is tuple}
FLAGS = tuple(k for k, t in _TYPES.items() if t is bool)


def nearest(wanted: object, known: Iterable[str], n: int | None = None) -> str:
    """The ``n`` known words most like ``wanted``, or all of them, best first: the end of an error message."""
    known = list(known)
    return ", ".join(difflib.get_close_matches(str(wanted), known, n=n or len(known), cutoff=0.0))


def one_of(values: type[StrEnum], where: str, value: Any) -> Any:
    """``value`` as a member of ``values``; ValueError naming ``where``, the value and those allowed."""
    try:
        return values(value)
    except ValueError:
        raise ValueError(f"{where}={value!r} is not one of {nearest(value, values)}") from None


def read_value(where: str, key: str, value: Any) -> Any:
    """One facet's ``value`` from TOML, checked; ``where`` begins the error, for example ``rela: ``."""
    where = f"{where}{key}"
    if key in SINGLE:
        return one_of(SINGLE[key], where, value)
    if key in MULTIPLE:
        if not isinstance(value, list) or not value or len(set(map(str, value))) < len(value):
            raise ValueError(f"{where}={value!r} must be a list of different values, one or more")
        return tuple(one_of(MULTIPLE[key], where, v) for v in value)
    if not isinstance(value, _TYPES[key]):
        raise ValueError(f"{where}={value!r} must be {'true or false' if key in FLAGS else 'a string'}")
    return value


def read_facets(slug: str, table: Mapping[str, Any]) -> Facets:
    """The facets in ``table``, every one checked.

    Raises:
        ValueError: a facet is unknown, or missing, or has a value that is not allowed; the message names slug, key,
            value and what is allowed, nearest first.
    """
    for key, value in table.items():
        if key not in _TYPES:
            raise ValueError(f"{slug}: {key}={value!r} is not a facet; facets, nearest first: {nearest(key, _TYPES)}")
    for key in _TYPES:
        if key not in table:
            values = SINGLE.get(key) or MULTIPLE.get(key)
            allowed = ", ".join(values) if values else "true, false" if key in FLAGS else "a string"
            raise ValueError(f"{slug}: {key} is missing; allowed: {allowed}")
    return Facets(**{key: read_value(f"{slug}: ", key, table[key]) for key in _TYPES})
