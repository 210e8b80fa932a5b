"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): does a model find the right ending of four the likeliest?

Each line of hellaswag_val.jsonl is an item: {"ctx": text, "endings": [4 texts], "label": 0 to 3, ...}.

Shapes: R endings of an item, T tokens of the longest one with its context.
"""

import json

import torch
from torch.nn import functional as F

from nanofit import machine
from nanofit.codec import codec_of
from nanofit.errors import UsageError


class HellaSwag:
    """A function of the model, for at_evaluation. All ranks must call it; each takes its share of the items.

    An item takes one forward pass, for its four endings; the whole validation set has 10,042 items.
    """

    def __init__(self, path, data_dir, model_args, world, device, dtype):
        """path: the file of items, which the tokenizer of the data set in data_dir encodes. Raises UsageError."""
        self.world, self.device, self.autocast = world, device, machine.autocast(device, dtype)
        encode = codec_of(data_dir, model_args["vocab_size"]).encode
        self.items, number = [], 0
        try:
            with open(path, encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):  # noqa: B007  # told of a line that fails
                    if line.strip():
                        self.items.append(_item(json.loads(line), encode, model_args["block_size"]))
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as e:
            where = f"hellaswag={path!r}{f', line {number}' if number else ''}"
            if isinstance(e, UsageError):
                raise UsageError(f"{where}: {e}") from e
            form = 'lines of JSON such as {"ctx": "A man", "endings": ["sits.", ...], "label": 0}'
            raise UsageError(f"{where} can't be read ({type(e).__name__}: {e}): it must hold {form}") from e
        if not self.items:
            raise UsageError(f"hellaswag={path!r} holds no items")

    def __call__(self, model):
        """Shares of items whose right ending is the likeliest: {'hellaswag': by its mean log likelihood per token,
        'hellaswag_sum': by its sum}."""
        right = torch.zeros(2)
        for number in range(0, len(self.items), self.world.size):  # as many passes on all ranks: sharded ones need it
            mine = number + self.world.rank
            rows, label = self.items[min(mine, len(self.items) - 1)]
            losses, counts = self._losses(model, rows)
            if mine < len(self.items):
                right += torch.stack([(losses / counts).argmin(), losses.argmin()]).cpu() == label
        means, sums = (sum(self.world.all_gather(right)) / len(self.items)).tolist()
        return {"hellaswag": means, "hellaswag_sum": sums}

    def _losses(self, model, rows):
        """The sum of each ending's negative log likelihoods, in nats, and its number of tokens; both (R,)."""
        x = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens[:-1]) for tokens, _ in rows], batch_first=True)
        y = torch.full_like(x, -1)  # (R, T): -1 outside the ending
        for row, (tokens, size) in zip(y, rows, strict=True):
            row[len(tokens) - 1 - size : len(tokens) - 1] = torch.tensor(tokens[len(tokens) - size :])
        x, y = x.to(self.device), y.to(self.device)
        with self.autocast:
            logits = model(x, y)[0]  # (R, T, vocab_size)
        losses = F.cross_entropy(logits.float().transpose(1, 2), y, ignore_index=-1, reduction="none")
        return losses.sum(1), (y >= 0).sum(1)


def _item(line, encode, block_size):
    """([(tokens, how many of them are the ending) for each ending], label). A long context loses its start."""
    context, rows = encode(line["ctx"]), []
    if not context:
        raise ValueError("an item's ctx is empty")
    for ending in line["endings"]:
        own = encode(" " + ending)
        tokens = [*context, *own][-block_size - 1 :]
        rows.append((tokens, min(len(own), block_size)))
    if str(line["label"]) not in map(str, range(len(rows))):
        raise ValueError(f"label {line['label']!r} names none of {len(rows)} endings")
    return rows, int(line["label"])
