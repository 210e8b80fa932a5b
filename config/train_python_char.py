# A small GPT on the source of Python's standard library: about three minutes on two CPU cores, seconds on a GPU.
out_dir = "out-python-char"
dataset = "python_char"
eval_interval = 500
eval_iters = 20
log_interval = 10

# 16 sequences x 128 tokens x 1 micro-step = 2,048 tokens an iteration; 1,500 iterations = 3.1 million tokens
batch_size = 16
block_size = 128
gradient_accumulation_steps = 1

# 0.8 million parameters
n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 2e-3
min_lr = 2e-4
max_iters = 1500
lr_decay_iters = 1500
warmup_iters = 100
beta2 = 0.99
compile = False  # compiling would take as long as a third of the run
