# GPT-2 124M on OpenWebText on one GPU, with the whole batch in one step. In nanoGPT this wants some 65 GiB.
# python train.py config/train_openwebtext.py

# 64 sequences x 1,024 tokens x 1 micro-step = 65,536 tokens an iteration
batch_size = 64
block_size = 1024
gradient_accumulation_steps = 1

# 20,000 iterations x 65,536 tokens = 1.3 billion tokens, about ten a parameter
max_iters = 20000
lr_decay_iters = 20000

# an evaluation reads 2 x 200 x 65,536 = 26 million tokens, every 65.5 million trained
eval_interval = 1000
eval_iters = 200
log_interval = 100
