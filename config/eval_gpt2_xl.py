# The loss of GPT-2 1558M on OpenWebText: 500 batches x 8 sequences x 1,024 tokens = 4.1 million tokens a split.
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = "gpt2-xl"
