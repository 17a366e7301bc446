"""Losses of pixels' embeddings: against prototypes, and against pixels of a bank."""

from torch import Tensor

from common.data import IGNORE


def assignment_cross_entropy(
    scores: Tensor, assignment: Tensor, temperature: float = 0.08
) -> Tensor:
    """−mean_n Σ_k Q_nk log softmax_k(scores_n / τ): scores and Q are (N, C), Q takes no gradient (SwAV, CPSL)."""
    return -(assignment.detach() * (scores.float() / temperature).log_softmax(1)).sum(1).mean()


def pixel_contrast(
    anchors: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    temperature: float = 0.08,
) -> Tensor:
    """Supervised contrast of anchors (N, D) with a bank (M, D), rows of unit length, labels (N,) and (M,).

        L_i = −1/(|P_i| + 1e-5) · Σ_{j∈P_i} [l_ij − log(e^{l_ij} + Σ_{n∉P_i} e^{l_in})],   l_ij = a_i·b_j/τ − max_j

    with P_i the bank's entries of anchor i's label; mean over anchors. The bank takes no gradient. Anchors and entries
    of the bank whose label is IGNORE take no part.
    """
    labelled = labels != IGNORE
    known = bank_labels != IGNORE
    similarity = anchors.float() @ bank.detach().float().T / temperature
    similarity = similarity - similarity.detach().amax(1, keepdim=True)
    same = (labels[:, None] == bank_labels) & known
    e = similarity.exp()
    negatives = e.masked_fill(same | ~known, 0).sum(1, keepdim=True)
    terms = (similarity - (e + negatives).log()).masked_fill(~same, 0)

    # an anchor without a label has no positives, so its term is 0
    of_anchors = terms.sum(1) / (same.sum(1) + 1e-5)
    return -of_anchors.sum() / labelled.sum().clamp(min=1)
