"""The settings of published models: every key of config.json is read or known to be neutral."""

import pytest

from lmjax.huggingface.model_types import MODEL_TYPES
from lmjax.huggingface.settings import read_settings

V, D, F = 96, 32, 56
COMMON = dict(
    architectures=["X"], initializer_range=0.02, torch_dtype="float32",
    transformers_version="4.42.0", use_cache=True, vocab_size=V)
OLD = dict(
    _name_or_path="x", attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.1,
    gradient_checkpointing=False, hidden_act="gelu", hidden_size=D, intermediate_size=F,
    layer_norm_eps=1e-12, max_position_embeddings=64, num_attention_heads=4, num_hidden_layers=2,
    position_embedding_type="absolute", type_vocab_size=2)
NEW = dict(
    bos_token_id=1, eos_token_id=[2, 3], hidden_act="silu", hidden_size=D, intermediate_size=F,
    max_position_embeddings=4096, num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2,
    rms_norm_eps=1e-5, attention_dropout=0.0, rope_theta=10000.0, tie_word_embeddings=False)
GENERATING = dict(
    do_sample=False, early_stopping=False, length_penalty=1.0, max_length=20, min_length=0,
    num_beams=1, num_return_sequences=1, repetition_penalty=1.0, temperature=1.0, top_k=50,
    top_p=1.0, num_labels=2, no_repeat_ngram_size=0, bad_words_ids=None, is_encoder_decoder=False,
    pruned_heads={})
GEMMA_PUBLISHED = NEW | dict(
    attention_bias=False, cache_implementation="hybrid", head_dim=16,
    hidden_activation="gelu_pytorch_tanh", pad_token_id=0, query_pre_attn_scalar=256,
    sliding_window=512)
T5_PUBLISHED = dict(
    d_ff=F, d_kv=8, d_model=D, decoder_start_token_id=0, dropout_rate=0.1, eos_token_id=1,
    initializer_factor=1.0, is_encoder_decoder=True, layer_norm_epsilon=1e-6, n_positions=512,
    num_heads=4, num_layers=2, output_past=True, pad_token_id=0, relative_attention_num_buckets=32,
    task_specific_params={"summarization": {"num_beams": 4}})
PUBLISHED = {
    "bert-base": ("bert", OLD | dict(
        pad_token_id=0, classifier_dropout=None, directionality="bidi", pooler_fc_size=768,
        pooler_num_attention_heads=12, pooler_num_fc_layers=3, pooler_size_per_head=128,
        pooler_type="first_token_transform")),
    "roberta-base": ("roberta", OLD | GENERATING | dict(
        bos_token_id=0, eos_token_id=2, pad_token_id=1, layer_norm_eps=1e-5,
        max_position_embeddings=66, type_vocab_size=1)),
    "gpt2-medium": ("gpt2", dict(
        activation_function="gelu_new", attn_pdrop=0.1, bos_token_id=95, embd_pdrop=0.1,
        eos_token_id=95, layer_norm_epsilon=1e-5, n_ctx=64, n_embd=D, n_head=4, n_layer=2,
        n_positions=64, n_special=0, predict_special_tokens=True, resid_pdrop=0.1,
        summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True,
        summary_type="cls_index", summary_use_proj=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}})),
    "llama-1": ("llama", NEW | dict(max_sequence_length=2048, pad_token_id=-1)),
    "llama-2": ("llama", NEW | dict(pretraining_tp=1, rope_scaling=None)),
    "llama-3.1": ("llama", NEW | dict(
        attention_bias=False, mlp_bias=False, pretraining_tp=1, rope_theta=500000.0, head_dim=8,
        rope_scaling=dict(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192, rope_type="llama3"))),
    "smollm2": ("llama", NEW | {
        "is_llama_config": True, "rope_interleaved": False, "pad_token_id": 2,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}),
    "mistral": ("mistral", NEW | dict(sliding_window=4096)),
    "mixtral": ("mixtral", NEW | dict(
        sliding_window=None, num_experts_per_tok=2, num_local_experts=4, output_router_logits=False,
        router_aux_loss_coef=0.02, rope_theta=1e6)),
    "qwen2.5": ("qwen2", NEW | dict(
        max_window_layers=2, rope_theta=1e6, sliding_window=32768, use_mrope=False,
        use_sliding_window=False)),
    "qwen3": ("qwen3", NEW | dict(
        attention_bias=False, head_dim=16, max_window_layers=2, rope_scaling=None,
        rope_theta=1000000, sliding_window=None, use_sliding_window=False)),
    "qwen3-moe": ("qwen3_moe", NEW | dict(
        attention_bias=False, decoder_sparse_step=1, head_dim=16, max_window_layers=2,
        mlp_only_layers=[], moe_intermediate_size=24, norm_topk_prob=True, num_experts=4,
        num_experts_per_tok=2, rope_scaling=None, output_router_logits=False,
        router_aux_loss_coef=0.001, sliding_window=None, use_sliding_window=False)),
    "gemma-2": ("gemma2", GEMMA_PUBLISHED | dict(
        hidden_act="gelu_pytorch_tanh", attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        sliding_window_size=512)),
    "gemma-3": ("gemma3_text", {
        name: value for name, value in GEMMA_PUBLISHED.items() if name != "hidden_act"} | dict(
        attn_logit_softcapping=None, final_logit_softcapping=None, rope_local_base_freq=10000,
        rope_scaling=None, rope_theta=1000000, sliding_window_pattern=6)),
    "t5-small": ("t5", T5_PUBLISHED),
    "flan-t5": ("t5", T5_PUBLISHED | dict(
        dense_act_fn="gelu_new", feed_forward_proj="gated-gelu", is_gated_act=True,
        num_decoder_layers=2, relative_attention_max_distance=128, tie_word_embeddings=False)),
    "modernbert-base": ("modernbert", dict(
        attention_bias=False, attention_dropout=0.0, bos_token_id=1, classifier_activation="gelu",
        classifier_bias=False, classifier_dropout=0.0, classifier_pooling="mean", cls_token_id=1,
        decoder_bias=True, embedding_dropout=0.0, deterministic_flash_attn=False, eos_token_id=2,
        global_attn_every_n_layers=3, global_rope_theta=160000.0, gradient_checkpointing=False,
        hidden_activation="gelu", hidden_size=D, initializer_cutoff_factor=2.0, intermediate_size=F,
        layer_norm_eps=1e-5, local_attention=128, local_rope_theta=10000.0, mlp_bias=False,
        max_position_embeddings=8192, mlp_dropout=0.0, norm_bias=False, norm_eps=1e-5,
        num_attention_heads=4, num_hidden_layers=4, pad_token_id=3,
        position_embedding_type="absolute", sep_token_id=2, sparse_pred_ignore_index=-100,
        sparse_prediction=False, repad_logits_with_grad=False, tie_word_embeddings=True)),
    "opus-mt": ("marian", dict(
        activation_dropout=0.0, activation_function="swish", add_bias_logits=False,
        add_final_layer_norm=False, attention_dropout=0.0, bad_words_ids=[[95]], bos_token_id=0,
        classif_dropout=0.0, classifier_dropout=0.0, d_model=D, decoder_attention_heads=4,
        decoder_ffn_dim=F, decoder_layerdrop=0.0, decoder_layers=2, decoder_start_token_id=95,
        decoder_vocab_size=V, dropout=0.1, encoder_attention_heads=4, encoder_ffn_dim=F,
        encoder_layerdrop=0.0, encoder_layers=2, eos_token_id=0, extra_pos_embeddings=V,
        forced_eos_token_id=0, id2label={"0": "LABEL_0"}, init_std=0.02, is_encoder_decoder=True,
        label2id={"LABEL_0": 0}, max_length=512, max_position_embeddings=512,
        normalize_before=False, normalize_embedding=False, num_beams=6, num_hidden_layers=2,
        pad_token_id=95, scale_embedding=True, share_encoder_decoder_embeddings=True,
        static_position_embeddings=True)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_settings_of_published_models_are_read(name):
    model_type, settings = PUBLISHED[name]
    config = read_settings(COMMON | settings | {"model_type": model_type}, name)
    assert type(config) is MODEL_TYPES[model_type].config
    assert (config.vocab_size, config.embed_dim) == (V, D)
    with pytest.raises(ValueError, match="expected settings that lmjax computes with, got odd=1"):
        read_settings(COMMON | settings | {"model_type": model_type, "odd": 1}, name)
