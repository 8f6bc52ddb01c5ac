"""Configurations of the DeepSeek families: LLM and MoE-16B, V2, V3."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SCORING_FUNCS = ("softmax", "sigmoid")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
MLA_MODES = ("auto", "absorbed", "expanded")
FP8_WEIGHTS = ("auto", "dequantize", "keep")

_EXPERTS_TP_PLAN = {
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.shared_experts.gate_proj": "colwise",
    "layers.*.mlp.shared_experts.up_proj": "colwise",
    "layers.*.mlp.shared_experts.down_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
_MHA_TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
_MLA_TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.q_b_proj": "colwise",
    "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}


@strict
class DeepseekConfig(PreTrainedConfig):
    r"""
    DeepSeek-LLM 7B / 67B (dense: leave `n_routed_experts` at `None`) and DeepSeekMoE-16B.

    Both spellings of a `config.json` are read: the official one (`rope_scaling` with `type`, `rope_theta`, `torch_dtype`)
    and the one of transformers 5 (`rope_parameters`, `dtype`). Fields that this class does not know are kept and written
    back.

    Args:
        first_k_dense_replace (`int`): layers below this index have a dense MLP.
        moe_layer_freq (`int`): of the layers from there on, every `moe_layer_freq`-th (by absolute index) has experts.
        n_routed_experts (`int`, *optional*): routed experts per MoE layer; `None` makes every layer dense.
        n_shared_experts (`int`, *optional*): shared experts, built as one MLP of `n_shared_experts * moe_intermediate_size`.
        num_experts_per_tok (`int`, *optional*): routed experts that a token visits.
        scoring_func (`str`): `"softmax"` or `"sigmoid"` over the router logits, in fp32.
        topk_method (`str`): `"greedy"` (plain top-k), `"group_limited_greedy"` (V2: the `topk_group` groups whose best expert
            scores highest) or `"noaux_tc"` (V3: groups by the sum of their two best `score + bias`, the bias only ranks).
        n_group, topk_group (`int`, *optional*): number of expert groups, and how many of them a token may use.
        norm_topk_prob (`bool`): divide the chosen scores by their sum.
        routed_scaling_factor (`float`): multiplies the gates (V2 applies it only to gates that were not normalised).
        num_nextn_predict_layers (`int`): multi-token prediction layers, stored behind the `num_hidden_layers` main ones.
        mtp_loss_weight (`float`): lambda of the MTP training loss (DeepSeek-V3 report, section 2.2).
        training_logits (`bool`): whether the model returns logits in training mode with labels. Without, they are made for a few
            tokens at a time, for the loss alone (once more in the backward pass, where tokens are fewer than `hidden_size`).
        aux_loss_alpha (`float`): factor of the expert-level balance loss in training; 0, as without it, computes nothing.
        seq_aux (`bool`): that loss for every sequence apart (V2, V3), each weighing as much as it has targets, so that
            micro-batches and ranks add up to the step; or for the whole batch at once, which is the micro-batch of one rank.
        device_aux_loss_alpha, comm_aux_loss_alpha (`float`): factors of the device- and communication-level balance losses over
            `n_group` groups of experts (V2: 0.05 and 0.02).
        moe_capacity_factor (`float`, *optional*): in training a group of experts serves at most this times its average share of
            a batch and drops the visits of lowest affinity, those of a tenth of the sequences excepted (V2: 1.0).
        fp8_weights (`str`): what becomes of the weights of a block-FP8 checkpoint: `"dequantize"` while they are read; `"keep"`
            them in FP8, frozen, to multiply in FP8 where a GPU can and else dequantise in blocks whenever they are used; `"auto"`
            is `"keep"` on a machine with such a GPU (compute capability 8.9).

    Raises:
        ValueError: for an architecture that cannot be built; the message names the value, the expected one and the way out.
    """

    model_type = "deepseek"
    keys_to_ignore_at_inference = ["past_key_values", "lm_loss", "mtp_loss", "mtp_logits"]
    attribute_map = {
        "num_local_experts": "n_routed_experts",
        "num_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }
    base_model_tp_plan = {**_MHA_TP_PLAN, **_EXPERTS_TP_PLAN}
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool = False
    routed_scaling_factor: float | int = 1.0
    num_nextn_predict_layers: int | None = 0
    mtp_loss_weight: float | int = 0.3
    training_logits: bool = True
    aux_loss_alpha: float | int = 0.0
    seq_aux: bool = True
    device_aux_loss_alpha: float | int = 0.0
    comm_aux_loss_alpha: float | int = 0.0
    moe_capacity_factor: float | int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int | None = 0.0
    mlp_bias: bool = False
    output_router_logits: bool = False
    fp8_weights: str = "auto"

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_nextn_predict_layers is None:
            self.num_nextn_predict_layers = 0
        kwargs.pop("model_type", None)  # a DeepSeek-LLM folder says "llama": it is read as ours and saved as ours
        self.attention_dropout = self.attention_dropout or 0.0
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1.")
        self._set_head_dims(kwargs)
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def _set_head_dims(self, kwargs: dict) -> None:
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}: "
                    "choose one that is, or set head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads

    @property
    def scales_normalized_gates(self) -> bool:
        """Whether `routed_scaling_factor` also multiplies gates that `norm_topk_prob` normalised: V3 and its `noaux_tc` yes."""
        return self.topk_method == "noaux_tc"

    @property
    def balance_factors(self) -> tuple[float, float, float]:
        """Of the expert-, device- and communication-level loss; all 0 without experts."""
        factors = (self.aux_loss_alpha, self.device_aux_loss_alpha, self.comm_aux_loss_alpha)
        return tuple(float(factor or 0) for factor in factors) if self.n_routed_experts else (0.0, 0.0, 0.0)

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` (MTP layers count on behind the main ones) has routed experts."""
        if self.n_routed_experts is None or layer_idx < self.first_k_dense_replace:
            return False
        return layer_idx >= self.num_hidden_layers or layer_idx % self.moe_layer_freq == 0

    def validate_architecture(self) -> None:
        """Raises `ValueError` for values that no DeepSeek model can have."""
        self._validate_heads()
        self._validate_yarn()
        known = ("default", *ROPE_INIT_FUNCTIONS)
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in known:
            raise ValueError(f"rope_type is {rope_type!r}: expected one of {', '.join(map(repr, known))}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act is {self.hidden_act!r}: expected an activation of transformers, silu in all releases."
            )
        if self.fp8_weights not in FP8_WEIGHTS:
            raise ValueError(
                f"fp8_weights is {self.fp8_weights!r}: expected one of {', '.join(map(repr, FP8_WEIGHTS))}."
            )
        if (self.n_shared_experts or 0) < 0:
            raise ValueError(f"n_shared_experts is {self.n_shared_experts}: use 0 or more.")
        if self.num_nextn_predict_layers < 0:
            raise ValueError(
                f"num_nextn_predict_layers is {self.num_nextn_predict_layers}: it counts MTP layers, use 0 or more."
            )
        if self.n_routed_experts is not None:
            self._validate_routing()

    def _validate_heads(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}: every key/value head serves the same number of query heads."
            )
        self._validate_rope_dim("head_dim", self.head_dim)

    @staticmethod
    def _validate_rope_dim(name: str, dim: int) -> None:
        if dim < 2 or dim % 2:
            raise ValueError(f"{name} is {dim}: RoPE rotates pairs, so it must be even and at least 2.")

    def _validate_yarn(self) -> None:
        rope = self.rope_parameters or {}
        if rope.get("rope_type", rope.get("type")) != "yarn":
            return
        factor = rope.get("factor")
        if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not factor >= 1:
            raise ValueError(
                f"YaRN needs a `factor` (a number >= 1, 40 in the releases), got {factor!r} in rope_parameters / rope_scaling "
                f"{rope}: set it, or remove the scaling."
            )
        if (rope.get("original_max_position_embeddings") or 0) < 1:
            raise ValueError(
                f"YaRN needs original_max_position_embeddings of at least 1 (4096 in the releases), got {rope}."
            )

    def _validate_balance(self) -> None:
        for name in ("aux_loss_alpha", "device_aux_loss_alpha", "comm_aux_loss_alpha"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: the factor of a loss is not negative; 0 turns it off."
                )
        if self.moe_capacity_factor is not None and self.moe_capacity_factor <= 0:
            raise ValueError(
                f"moe_capacity_factor is {self.moe_capacity_factor}: expected more than 0 (1.0 in V2), or None to drop nothing."
            )
        for name in ("device_aux_loss_alpha", "comm_aux_loss_alpha", "moe_capacity_factor"):
            if getattr(self, name) and (self.n_group or 1) < 2:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which balances groups of experts, and n_group is {self.n_group}: set it "
                    f"(8 in V2) and topk_group, or leave {name} out."
                )

    def _validate_routing(self) -> None:
        self._validate_balance()
        experts, groups = self.n_routed_experts, self.n_group or 1
        allowed, top_k = groups if self.topk_group is None else self.topk_group, self.num_experts_per_tok
        for name, value, known in (
            ("scoring_func", self.scoring_func, SCORING_FUNCS),
            ("topk_method", self.topk_method, TOPK_METHODS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}: expected one of {', '.join(map(repr, known))}.")
        for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_layer_freq"):
            value = getattr(self, name)
            if value is None or value < 1:
                raise ValueError(
                    f"{name} is {value}: a model with routed experts needs at least 1 "
                    "(n_routed_experts=None makes a dense model)."
                )
        if experts % groups:
            raise ValueError(
                f"n_routed_experts {experts} is not divisible by n_group {groups}: all groups have the same size."
            )
        if not 1 <= allowed <= groups:
            raise ValueError(
                f"topk_group {allowed} is not between 1 and n_group {groups}: a token cannot use more groups than exist."
            )
        reachable = experts if self.topk_method == "greedy" else experts // groups * allowed
        if top_k > reachable:
            raise ValueError(
                f"num_experts_per_tok {top_k} exceeds the {reachable} experts that a token can reach "
                f"({experts} experts, topk_group {allowed} of n_group {groups}): lower it or allow more groups."
            )


@strict
class DeepseekV2Config(DeepseekConfig):
    r"""
    DeepSeek-V2, V2-Lite, V2.5 and Coder-V2: multi-head latent attention (DeepSeek-V2 paper, section 2.1).

    Args (beyond [`DeepseekConfig`]):
        kv_lora_rank (`int`): width of the latent that is cached for keys and values.
        q_lora_rank (`int`, *optional*): width of the query latent; `None` (V2-Lite) projects queries directly.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim (`int`): per-head sizes without and with position, and of values.
        rope_interleave (`bool`): rotate neighbouring pairs (every release) instead of halves.
        mla_mode (`str`): `"auto"` runs attention in latent space ("absorbed") when few new tokens meet a cache and expands
            keys and values otherwise; `"absorbed"` and `"expanded"` force one form. The result is the same within rounding.
    """

    model_type = "deepseek_v2"
    base_model_tp_plan = {**_MLA_TP_PLAN, **_EXPERTS_TP_PLAN}

    num_hidden_layers: int = 32
    n_shared_experts: int | None = 2
    n_routed_experts: int | None = 64
    num_experts_per_tok: int | None = 6
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_interleave: bool = True
    mla_mode: str = "auto"

    def _set_head_dims(self, kwargs: dict) -> None:
        # transformers reads head_dim as the rotated size, and qk_head_dim as the mark of an MLA model
        kwargs.pop("qk_head_dim", None)
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.head_dim = self.qk_rope_head_dim

    def _validate_heads(self) -> None:
        if self.mla_mode not in MLA_MODES:
            raise ValueError(f"mla_mode is {self.mla_mode!r}: expected one of {', '.join(map(repr, MLA_MODES))}.")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} differs from num_attention_heads {self.num_attention_heads}: "
                "with latent attention every query head has its own keys and values; leave it out."
            )
        self._validate_rope_dim("qk_rope_head_dim", self.qk_rope_head_dim)
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1.")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(
                f"q_lora_rank is {self.q_lora_rank}: expected at least 1, or None for a direct query projection."
            )


@strict
class DeepseekV3Config(DeepseekV2Config):
    r"""
    DeepSeek-V3, R1, V3.1 and other models of that architecture; see [`DeepseekV2Config`]. The defaults are V3's shape
    without its MTP layer.
    """

    model_type = "deepseek_v3"

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    n_shared_experts: int | None = 1
    n_routed_experts: int | None = 256
    num_experts_per_tok: int | None = 8
    first_k_dense_replace: int = 3
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    n_group: int | None = 8
    topk_group: int | None = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 2.5
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1

    @property
    def scales_normalized_gates(self) -> bool:
        return True


__all__ = ["DeepseekConfig", "DeepseekV2Config", "DeepseekV3Config"]
