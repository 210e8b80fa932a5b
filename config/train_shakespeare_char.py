# A small GPT on Shakespeare's characters: minutes on a GPU. It overfits after a while, so that only the best is kept.
out_dir = "out-shakespeare-char"
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

# 64 sequences x 256 tokens x 1 micro-step = 16,384 tokens an iteration; 5,000 of them see the text 80 times
dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

# 10.6 million parameters
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # a small model bears a higher one
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # few tokens an iteration: average over more iterations
warmup_iters = 100
