"""The settings of tiny models of transformers."""

V, D, F, LAYERS, POSITIONS = 96, 32, 56, 2, 48
COMMON = dict(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS,
    num_attention_heads=4, max_position_embeddings=POSITIONS, initializer_range=0.3)
LLAMA = COMMON | dict(
    num_key_value_heads=2, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0})
GPT2 = dict(vocab_size=V, n_embd=D, n_layer=LAYERS, n_head=4, n_positions=POSITIONS,
            initializer_range=0.3)
GEMMA = LLAMA | dict(
    head_dim=16, query_pre_attn_scalar=20, sliding_window=5, tie_word_embeddings=True,
    num_hidden_layers=3)
T5 = dict(
    vocab_size=V, d_model=D, d_kv=16, d_ff=F, num_layers=LAYERS, num_decoder_layers=3, num_heads=4,
    relative_attention_num_buckets=8, relative_attention_max_distance=12)
ROBERTA = COMMON | dict(
    max_position_embeddings=POSITIONS + 2, type_vocab_size=1, pad_token_id=1)
DISTILBERT = dict(vocab_size=V, dim=D, hidden_dim=F, n_layers=LAYERS, n_heads=4,
                  max_position_embeddings=POSITIONS, initializer_range=0.3)
MODERNBERT = COMMON | dict(num_hidden_layers=4, local_attention=8, pad_token_id=0)
MARIAN = dict(
    vocab_size=V, d_model=D, encoder_layers=LAYERS, decoder_layers=3, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=F, decoder_ffn_dim=F,
    max_position_embeddings=POSITIONS, pad_token_id=0, decoder_start_token_id=0, init_std=0.3)
EXPERTS = dict(num_experts=4, num_experts_per_tok=3, moe_intermediate_size=24)
