"""Small, whole config.json files of every model type, and values that are worth trying in them."""

V = 96
MODERN = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=48, hidden_act="silu", rms_norm_eps=1e-5,
    tie_word_embeddings=False, attention_dropout=0.0, bos_token_id=1, eos_token_id=2)


def without(base, *names):
    return {name: value for name, value in base.items() if name not in names}


LLAMA = MODERN | dict(rope_theta=500.0, attention_bias=False, mlp_bias=False, head_dim=8)
QWEN = MODERN | dict(rope_theta=500.0, use_sliding_window=False, sliding_window=4,
                     max_window_layers=1)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True,
               decoder_sparse_step=1, mlp_only_layers=[])
GEMMA = {name: LLAMA[name] for name in LLAMA if name not in ("mlp_bias", "hidden_act")} | dict(
    hidden_activation="gelu_pytorch_tanh", head_dim=16, query_pre_attn_scalar=20, sliding_window=4,
    tie_word_embeddings=True)
BERT = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=48, hidden_act="gelu", layer_norm_eps=1e-6, type_vocab_size=2,
    pad_token_id=0, tie_word_embeddings=True, position_embedding_type="absolute")
ROBERTA = BERT | dict(pad_token_id=1, max_position_embeddings=50)
T5 = dict(
    vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, layer_norm_epsilon=1e-5,
    feed_forward_proj="relu", is_encoder_decoder=True, pad_token_id=0, decoder_start_token_id=0,
    tie_word_embeddings=True)
BART = dict(
    vocab_size=V, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=48,
    pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, activation_function="gelu",
    scale_embedding=False, is_encoder_decoder=True, num_hidden_layers=2, tie_word_embeddings=True)
COHERE = without(MODERN, "rms_norm_eps") | dict(
    rope_theta=500.0, layer_norm_eps=1e-4, logit_scale=0.25, tie_word_embeddings=True)
GLM = MODERN | dict(
    pad_token_id=0, rope_theta=500.0, head_dim=8, partial_rotary_factor=0.5, attention_bias=True)
DEEPSEEK = MODERN | dict(
    rope_theta=500.0, num_key_value_heads=4, attention_bias=False, kv_lora_rank=16, q_lora_rank=24,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12, n_routed_experts=8, n_shared_experts=2,
    num_experts_per_tok=3, moe_intermediate_size=12, first_k_dense_replace=1, n_group=4,
    topk_group=2, routed_scaling_factor=2.5, rope_scaling=dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=12, mscale=0.7,
        mscale_all_dim=0.9, beta_fast=32, beta_slow=1))
# model type -> a whole config.json
BASES = {
    "llama": LLAMA,
    "mistral": MODERN | dict(rope_theta=500.0, sliding_window=4, head_dim=8),
    "mixtral": MODERN | dict(rope_theta=500.0, sliding_window=None, num_local_experts=4,
                             num_experts_per_tok=2),
    "qwen2": QWEN,
    "qwen3": QWEN | dict(head_dim=16, attention_bias=False),
    "qwen2_moe": QWEN | EXPERTS | dict(shared_expert_intermediate_size=40, qkv_bias=True),
    "qwen3_moe": QWEN | EXPERTS | dict(head_dim=16, attention_bias=False),
    "gemma": {name: value for name, value in GEMMA.items() if name not in (
        "hidden_activation", "query_pre_attn_scalar", "sliding_window")} | dict(hidden_act="gelu"),
    "gemma2": GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": GEMMA | dict(sliding_window_pattern=2, rope_local_base_freq=50.0),
    "phi3": MODERN | dict(rope_theta=500.0, sliding_window=4, original_max_position_embeddings=48,
                          resid_pdrop=0.0, embd_pdrop=0.0, pad_token_id=0),
    "granite": {name: value for name, value in LLAMA.items() if name != "head_dim"} | dict(
        embedding_multiplier=6.0, logits_scaling=2.0, residual_multiplier=0.5,
        attention_multiplier=0.2),
    "olmo": without(MODERN, "rms_norm_eps") | dict(
        rope_theta=500.0, attention_bias=False, clip_qkv=0.4, pad_token_id=1),
    "olmo2": MODERN | dict(rope_theta=500.0, attention_bias=False),
    "olmo3": MODERN | dict(
        num_hidden_layers=5, sliding_window=4, attention_bias=False, rope_scaling=dict(
            rope_type="yarn", factor=2.0, original_max_position_embeddings=24,
            attention_factor=1.2)),
    "smollm3": MODERN | dict(
        num_hidden_layers=5, rope_theta=500.0, attention_bias=False, mlp_bias=False,
        no_rope_layer_interval=2, use_sliding_window=False, pad_token_id=0),
    "ministral": MODERN | dict(rope_theta=500.0, sliding_window=4, head_dim=8, layer_types=[
        "full_attention", "sliding_attention", "sliding_attention"]),
    "starcoder2": without(MODERN, "rms_norm_eps") | dict(
        rope_theta=500.0, sliding_window=4, hidden_act="gelu_pytorch_tanh", norm_epsilon=1e-4,
        use_bias=True, residual_dropout=0.1, embedding_dropout=0.1, tie_word_embeddings=True),
    "stablelm": without(MODERN, "rms_norm_eps") | dict(
        rope_theta=500.0, layer_norm_eps=1e-4, partial_rotary_factor=0.5, use_qkv_bias=True,
        qk_layernorm=True, use_parallel_residual=True),
    "cohere": COHERE | dict(use_qk_norm=True, attention_bias=False),
    "cohere2": COHERE | dict(num_hidden_layers=5, sliding_window=4, sliding_window_pattern=3),
    "glm": GLM,
    "glm4": GLM,
    "deepseek_v2": DEEPSEEK | dict(topk_method="group_limited_greedy", norm_topk_prob=False),
    "deepseek_v3": DEEPSEEK | dict(topk_method="noaux_tc", norm_topk_prob=True,
                                   scoring_func="sigmoid", num_nextn_predict_layers=1),
    "kimi_k2": DEEPSEEK | dict(topk_method="noaux_tc", norm_topk_prob=True, scoring_func="sigmoid",
                               n_group=1, topk_group=1),
    "gpt_oss": without(MODERN, "hidden_act") | dict(
        head_dim=16, sliding_window=4, num_local_experts=4, num_experts_per_tok=2, rope_theta=500.0,
        attention_bias=True, swiglu_limit=7.0, experts_per_token=2, initial_context_length=24,
        rope_scaling=dict(rope_type="yarn", factor=4.0, beta_fast=8.0, beta_slow=1.0,
                          truncate=False, original_max_position_embeddings=24)),
    "gpt_neox": dict(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3, hidden_act="gelu",
        num_attention_heads=4, max_position_embeddings=48, layer_norm_eps=1e-4, rotary_pct=0.5,
        rotary_emb_base=500, use_parallel_residual=True, tie_word_embeddings=False,
        attention_bias=True),
    "gptj": dict(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_inner=48, n_positions=48,
                 activation_function="gelu_new", layer_norm_epsilon=1e-4, rotary_dim=8,
                 tie_word_embeddings=False, scale_attn_weights=True),
    "phi": without(MODERN, "rms_norm_eps") | dict(
        hidden_act="gelu_new", layer_norm_eps=1e-4, partial_rotary_factor=0.5, rope_theta=500.0,
        qk_layernorm=False),
    "falcon": dict(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        ffn_hidden_size=48, layer_norm_epsilon=1e-4, new_decoder_architecture=True, alibi=False,
        multi_query=True, parallel_attn=True, bias=False, rope_theta=500.0, activation="gelu",
        tie_word_embeddings=True),
    "opt": dict(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=48, activation_function="relu", do_layer_norm_before=True,
        word_embed_proj_dim=32, enable_bias=True, layer_norm_elementwise_affine=True,
        pad_token_id=1, tie_word_embeddings=True),
    "gpt2": dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=48,
                 activation_function="gelu_new", layer_norm_epsilon=1e-4, tie_word_embeddings=True,
                 scale_attn_weights=True),
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": dict(
        vocab_size=V, dim=32, n_layers=2, n_heads=4, hidden_dim=48, activation="gelu",
        max_position_embeddings=48, sinusoidal_pos_embds=False, pad_token_id=0,
        tie_word_embeddings=True),
    "albert": without(BERT, "position_embedding_type") | dict(
        num_hidden_layers=3, embedding_size=16, hidden_act="gelu_new", num_hidden_groups=1,
        inner_group_num=1),
    "electra": BERT | dict(embedding_size=16, hidden_act="gelu_new"),
    "modernbert": dict(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=48, hidden_activation="gelu", norm_eps=1e-4,
        global_attn_every_n_layers=2, local_attention=6, global_rope_theta=500.0,
        local_rope_theta=50.0, pad_token_id=0, classifier_activation="gelu", norm_bias=False,
        attention_bias=False, mlp_bias=False, decoder_bias=True, classifier_bias=False,
        tie_word_embeddings=True),
    "bart": BART | dict(normalize_before=False, add_final_layer_norm=False, classif_dropout=0.1),
    "mbart": BART | dict(scale_embedding=True, activation_function="relu"),
    "pegasus": BART | dict(scale_embedding=True, pad_token_id=0, static_position_embeddings=True),
    "m2m_100": BART | dict(scale_embedding=True, activation_function="relu"),
    "t5": T5,
    "mt5": T5 | dict(feed_forward_proj="gated-gelu"),
    "marian": BART | dict(
        decoder_vocab_size=V, pad_token_id=0, decoder_start_token_id=0, activation_function="swish",
        scale_embedding=True, static_position_embeddings=True,
        share_encoder_decoder_embeddings=True),
}
# Other names that transformers' classes know for one key (their attribute_map).
OTHER_NAMES = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings", "d_model": "hidden_size", "d_kv": "head_dim",
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "encoder_attention_heads": "num_attention_heads", "encoder_layers": "num_hidden_layers",
    "num_experts": "num_local_experts", "num_local_experts": "num_experts"}
ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "quick_gelu",
               "gelu_fast", "tanh", "gelu_python"]
PROJECTIONS = ["relu", "gelu", "silu", "gelu_new", "gated-gelu", "gated-silu", "gated-relu",
               "gated-gelu_new", "gated", "relu-gated"]
# Values worth trying: (a pattern of keys, values)
VALUES = [
    (r"hidden_act.*|activation|activation_function|dense_act_fn|classifier_activation",
     ACTIVATIONS),
    (r"feed_forward_proj", PROJECTIONS),
    (r".*(eps|epsilon)", [1e-12, 1e-6, 1e-5, 1e-3, 0.1, 0, 0.0, "1e-5"]),
    (r"(max_|n_)position.*|original_max_position_embeddings", [16, 24, 48, 50, 64, 4096]),
    (r"sliding_window|local_attention", [1, 2, 3, 5, 8, 4096, 0, None]),
    (r"sliding_window_pattern|_sliding_window_pattern|global_attn_every_n_layers|max_window_layers",
     [0, 1, 2, 3, 6, 28]),
    (r".*rope_theta|rope_local_base_freq", [10.0, 100, 500.0, 10000.0, 1e6, None]),
    (r"head_dim|d_kv", [4, 8, 16, None]),
    (r"num_key_value_heads", [1, 2, 4, None]),
    (r"num_attention_heads|n_head|num_heads", [2, 4, 8]),
    (r"(attn|final)_logit_softcapping", [None, 0.0, 1.0, 5.0, 50.0]),
    (r"query_pre_attn_scalar", [4, 16, 20.5, 256]),
    (r".*_multiplier|logits_scaling", [1, 1.0, 0.25, 3.0, 0.0, -1.0]),
    (r"n_inner|intermediate_size|d_ff|ffn_dim|ffn_hidden_size", [None, 40, 48, 128]),
    (r"pad_token_id", [None, -1, 0, 1, 2]),
    (r"num_experts_per_tok", [1, 2, 3, 4, 5]),
    (r"q_lora_rank", [None, 16, 0]),
    (r"qk_.*_head_dim|v_head_dim", [2, 4, 8, 12, 3]),
    (r"n_group|topk_group|n_shared_experts", [1, 2, 3, 4, None, 0]),
    (r"first_k_dense_replace", [0, 1, 2, 3, None]),
    (r"topk_method", ["greedy", "group_limited_greedy", "noaux_tc", None]),
    (r"position_embedding_type", ["absolute", "relative_key", None]),
    (r"partial_rotary_factor", [1.0, 0.5, 0.25, 0.3, None]),
    (r"type_vocab_size", [0, 1, 2]),
    (r"layer_types", [None, []]),
    (r"decoder_sparse_step", [1, 2, 0]),
    (r"mlp_only_layers", [[], [0], None]),
    (r"no_rope_layers", [None, [1, 0, 1, 0, 1], [0] * 5, [1] * 9, [1, 0]]),
    (r"no_rope_layer_interval", [1, 2, 3, 7]),
    (r"swiglu_limit|swiglu_alpha", [7.0, 1.702, 7, None]),
    (r"num_local_experts|num_experts", [2, 4, 8]),
    (r"clip_qkv", [None, 0.2, 8.0, 0.0]),
    (r"rotary_dim", [2, 4, 6, 16, 5, 64]),
    (r"rotary_pct", [0.25, 0.5, 1.0, 0.3, 2.0]),
    (r"rotary_emb_base", [10, 100.0, 10000]),
    (r"logit_scale", [1.0, 0.25, 3, 0.0]),
    (r"num_kv_heads", [1, 2, 4, None]),
    (r"num_ln_in_parallel_attn", [None, 1, 2]),
    (r"word_embed_proj_dim", [None, 16, 32]),
    (r"multi_query|new_decoder_architecture|parallel_attn|alibi|qk_layernorm|do_layer_norm_before"
     r"|enable_bias|layer_norm_elementwise_affine|_remove_final_layer_norm|bias",
     [True, False]),
    (r"attention_dropout|attn_pdrop", [0.0, 0.1]),
    (r"tie_word_embeddings|.*_bias|is_gated_act|use_.*|is_causal|scale_.*|is_decoder|norm_topk_prob"
     r"|add_cross_attention|share_.*|is_encoder_decoder", [True, False, None]),
    (r"dtype|torch_dtype", ["float32", "bfloat16", "auto"]),
]
# Keys that configs on the hub have, for one class or another, and that newer versions write.
STRANGE = dict(
    unsloth_fixed=True, unsloth_version="2025.1", _attn_implementation_autoset=True,
    use_mrope=False, rope_interleaved=False, is_llama_config=True, pretraining_tp=2,
    output_past=True, reference_compile=None, sep_token_id=2, auto_map={}, quantization_config=None,
    tokenizer_class="X", gradient_checkpointing=False, problem_type=None, use_cache=True,
    use_sliding_window=True, is_causal=False, partial_rotary_factor=0.5, attention_chunk_size=4,
    embedding_size=16, per_layer_config={"0": {"rms_norm_eps": 0.5}}, layer_types=None,
    dense_act_fn="silu", is_gated_act=True, mlp_bias=True, attention_bias=True, qkv_bias=False,
    hidden_act="relu", hidden_activation="relu", n_inner=40, head_dim=4,
    scale_decoder_outputs=False, normalize_before=True, add_final_layer_norm=True, dtype="float32",

    rope_local_base_freq=30.0, global_rope_theta=30.0, original_max_position_embeddings=16,
    use_bidirectional_attention=True,
    chunk_size_feed_forward=2, pruned_heads={}, torchscript=False, tie_encoder_decoder=False,
    max_length=20, prefix=None, return_dict=True, num_local_experts=4, intermediate_size=40,
    attention_multiplier=0.5, logits_scaling=3.0, resid_pdrop=0.1, embd_pdrop=0.1,
    name_or_path="x", _commit_hash="0", use_bfloat16=False, tf_legacy_loss=False,
    output_attentions=False, cache_implementation="hybrid", sliding_window_size=4,
    num_ln_in_parallel_attn=1, _remove_final_layer_norm=True, no_rope_layers=[1, 0, 1, 0, 1],
    vocab_size=V, layer_norm_eps=0.1, rms_norm_eps=0.1, norm_eps=0.1, layer_norm_epsilon=0.1)
KINDS = ["default", "linear", "yarn", "llama3", "dynamic", "longrope", "proportional", "odd"]
