"""What of a reference's numbers is rounding: another processor rounds otherwise.

The references were run with vectors of 512 bits. Shorter ones add in another order, and with their weights, which no
training has made, what the first layers get back is sums that nearly cancel: their gradient norms, and with them the
norm of all, move by one to three parts in a thousand, in float64 too.
"""

import torch

SAME_ORDER = torch.backends.cpu.get_cpu_capability() == "AVX512"
EARLY = 1e-3 if SAME_ORDER else 5e-3  # relative, of gradient norms of the first layers and of all together
