"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): does a model find the ending of a text likelier than three others?

Each line of hellaswag_val.jsonl is an item: {"ctx": text, "endings": [4 texts], "label": 0 to 3, ...}. An ending's
likelihood is the model's, given the text before it; its length is counted in the model's own tokens.

Shapes: R endings of an item, T tokens of the longest one with its context.
"""

import json

import torch
from torch.nn import functional as F

from nanofit import machine
from nanofit.codec import codec_of
from nanofit.errors import UsageError


class HellaSwag:
    """A function of the model, for at_evaluation. All ranks must call it; each looks at its share of the items.

    An item takes one forward pass of its four endings; so the whole validation set, 10,042 items, is that many passes.
    The first lines of the file are a smaller one.
    """

    def __init__(self, path, data_dir, model_args, world, device, dtype):
        """path: of the items, in the tokens of the data set in data_dir. UsageError for what they can't be."""
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
        """{'hellaswag': share of items whose likeliest ending, by its mean log likelihood a token, is the right one;
        'hellaswag_sum': by its whole log likelihood}."""
        right = torch.zeros(2)
        for number in range(0, len(self.items), self.world.size):  # all ranks make as many passes: sharded ones must
            mine = number + self.world.rank
            rows, label = self.items[min(mine, len(self.items) - 1)]
            losses, counts = self._losses(model, rows)
            if mine < len(self.items):
                right += torch.stack([(losses / counts).argmin(), losses.argmin()]).cpu() == label
        means, sums = (sum(self.world.all_gather(right)) / len(self.items)).tolist()
        return {"hellaswag": means, "hellaswag_sum": sums}

    def _losses(self, model, rows):
        """Of each ending: the sum of its tokens' negative log likelihoods, in nats, and their number; both (R,)."""
        x = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens[:-1]) for tokens, _ in rows], batch_first=True)
        y = torch.full_like(x, -1)  # (R, T): what isn't an ending's counts for nothing
        for row, (tokens, size) in zip(y, rows, strict=True):
            row[len(tokens) - 1 - size : len(tokens) - 1] = torch.tensor(tokens[len(tokens) - size :])
        x, y = x.to(self.device), y.to(self.device)
        with self.autocast:
            logits, _ = model(x, y)  # (R, T, vocab_size)
        losses = F.cross_entropy(logits.float().transpose(1, 2), y, ignore_index=-1, reduction="none")
        return losses.sum(1), (y >= 0).sum(1)


def _item(line, encode, block_size):
    """([(tokens, how many of them are the ending's) of each ending], label). Of too long a context, its end stays."""
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
