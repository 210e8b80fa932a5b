"""What a pickle would cost to read, told from its opcodes alone."""

import pickle
import pickletools

MOST_VALUES = 10**6  # that a tuple may hold, and those in it; a checkpoint's hold some ten
_CONTAINERS = ("LIST", "APPEND", "DICT", "SETITEM", "ADDITEMS")  # nothing hashes these


def refuse_endless(pickled):
    """Raise pickle.UnpicklingError where a tuple of the next pickle of an open file, as a key, would take ages to hash.

    A tuple that holds another twice, which holds another twice, and so on, has a few bytes a level, and each level
    doubles the time.
    """
    stack, marks, memo = [], [], {}  # how many values each value has in it
    for opcode, argument, _ in pickletools.genops(pickled):
        name, taken = opcode.name, []
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        else:
            for kind in reversed(opcode.stack_before):
                if kind is pickletools.markobject:
                    mark = marks.pop()
                    taken += stack[mark:]
                    del stack[mark:]
                elif kind is not pickletools.stackslice:
                    taken.append(stack.pop())
            values = 1 if name.startswith(_CONTAINERS) else 1 + sum(taken)
            if values > MOST_VALUES:
                raise pickle.UnpicklingError("it holds tuples in tuples in tuples")
            stack += [values] * len(opcode.stack_after)
