"""Counter-based random words for dropout, as one scalar formula for every compiler.

Philox4x32-10 of Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC
2011), section 4. The functions are undecorated integer arithmetic: a kernel wraps them for its own
target. They hold in Python's unbounded integers and in int64 that wraps around alike.
"""

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox4x32(
    counter_0: int, counter_1: int, counter_2: int, counter_3: int, key_0: int, key_1: int
) -> tuple[int, int, int, int]:
    """Return four random 32-bit words for a counter of four words and a key of two.

    >>> [f"{word:08x}" for word in philox4x32(0, 0, 0, 0, 0, 0)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    for _ in range(ROUNDS):
        product_0 = counter_0 * MULTIPLIERS[0]
        product_1 = counter_2 * MULTIPLIERS[1]
        counter_0, counter_2 = (
            ((product_1 >> 32) & WORD) ^ counter_1 ^ key_0,
            ((product_0 >> 32) & WORD) ^ counter_3 ^ key_1,
        )
        counter_1, counter_3 = product_1 & WORD, product_0 & WORD
        key_0, key_1 = (key_0 + KEY_STEPS[0]) & WORD, (key_1 + KEY_STEPS[1]) & WORD
    return counter_0, counter_1, counter_2, counter_3
