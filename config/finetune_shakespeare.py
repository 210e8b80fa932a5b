# Finetune GPT-2 XL on Shakespeare.
import time

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())

dataset = "shakespeare"
init_from = "gpt2-xl"

always_save_checkpoint = False  # only when the validation loss is the best so far

# 1 sequence x 32 micro-steps x 1,024 tokens = 32,768 tokens an iteration; the text has 301,966, so 9.2 make an epoch
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
