"""Attack: the coordinator and its colluders bend the sparse graph, of which no site sees the whole.

They bend it, cut it in two, or show a site as alive to some of its holders and as dropped to others.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from support.rounds import StoppedRound

from secureagg import (
    AuthenticationFailed,
    InconsistentSurvivors,
    MalformedMessage,
    RoundAborted,
    RoundReplayed,
    SiteId,
    ThresholdNotMet,
    UnexpectedMessage,
    participant,
)
from secureagg.codec import sign
from secureagg.messages import (
    Acknowledgement,
    AcknowledgementList,
    CohortKeys,
    EncryptedShares,
    Inclusion,
    SiteMessage,
    SparseAdvertisement,
    SparseDelivery,
    SparseInput,
    SparseKeys,
    SparseReceipt,
    SparseSurvivors,
    SurvivorList,
    ToSite,
    UnmaskRequest,
    UnmaskShares,
)
from secureagg.phases import Aborted, AwaitingReceipt, CoordinatorFinished

replace = msgspec.structs.replace


def sparse(**options: Any) -> StoppedRound:
    """A round of twelve sites with eight holders each, of whom six reconstruct."""
    stopped = StoppedRound(12, **{"graph": "sparse", "max_corrupt": 0, "max_dropouts": 1, **options})
    assert (stopped.parameters.neighbours, stopped.parameters.threshold) == (8, 6)
    return stopped


def signed(stopped: StoppedRound, message: SiteMessage, **changes: object) -> Any:
    """``message`` with ``changes``, signed by its sender: what a colluding site can make."""
    changed = replace(message, **changes)
    return sign(changed, stopped.identities[changed.sender])


def refuse(stopped: StoppedRound, site: SiteId, message: ToSite, error: type[Exception], text: str) -> None:
    """``site`` refuses ``message`` and ends the round."""
    with pytest.raises(error, match=text):
        stopped.answers(site, message)
    assert isinstance(stopped.participants[site].phase, Aborted)


def position(stopped: StoppedRound, site: SiteId) -> int:
    """The place of ``site`` in the cohort."""
    return stopped.parameters.positions[site]


def at_keys() -> tuple[StoppedRound, SiteId, SparseKeys]:
    """A round at the keys, its first site, and what the honest coordinator shows it."""
    stopped = sparse()
    site = stopped.sites[0]
    message = stopped.until(SparseKeys)[site]
    assert isinstance(message, SparseKeys)
    return stopped, site, message


def of(site: SiteId, message: SparseKeys) -> SparseAdvertisement:
    """The advertisement of ``site``."""
    return next(item for item in message.advertisements if item.sender == site)


def instead(message: SparseKeys, advertisement: SparseAdvertisement) -> SparseKeys:
    """``message`` with this advertisement in the place of its sender's."""
    shown = (advertisement if item.sender == advertisement.sender else item for item in message.advertisements)
    return replace(message, advertisements=tuple(shown))


# --- the graph is bent ---


def test_the_coordinator_chooses_a_sites_holders() -> None:
    """A site's own holders, exchanged for others, are noticed by the site itself.

    Stopped by the comparison with the own advertisement in ``Participant._share_secrets``.
    """
    stopped = sparse()
    everyone = stopped.until(SparseKeys)
    known = {item.sender: item for message in everyone.values() for item in message.advertisements}
    site = stopped.sites[0]
    own = signed(stopped, known[site], neighbours=redrawn(known[site], 1))
    shown = {stopped.sites[place - 1] for place in own.neighbours} | {
        peer for peer, item in known.items() if 1 in item.neighbours
    }
    advertisements = (own, *(known[peer] for peer in sorted(shown)))
    message = SparseKeys(context=own.context, advertisements=advertisements)
    refuse(stopped, site, message, AuthenticationFailed, "own advertisement")


def test_the_coordinator_chooses_a_peers_holders() -> None:
    """A peer's holders, exchanged for others, are noticed by everyone.

    Stopped by ``check_signature`` in ``Participant._share_secrets``: the site that drew has signed.
    """
    stopped, site, message = at_keys()
    peer = next(item for item in message.advertisements if 1 in item.neighbours)
    changed = replace(peer, neighbours=redrawn(peer, position(stopped, peer.sender)))
    refuse(stopped, site, instead(message, changed), AuthenticationFailed, "does not verify")


def redrawn(advertisement: SparseAdvertisement, own: int) -> tuple[int, ...]:
    """Other holders than were drawn, this site's first one kept."""
    first, *_, last = advertisement.neighbours
    free = {*range(1, 13)} - {own, *advertisement.neighbours}
    return tuple(sorted({*advertisement.neighbours, min(free)} - {last if first == 1 else first}))


@pytest.mark.parametrize(
    "draw",
    [
        lambda _own, drawn: drawn[1:],
        lambda _own, drawn: (drawn[0], *drawn[:-1]),
        lambda _own, drawn: drawn[::-1],
        lambda own, drawn: tuple(sorted({own, *drawn[1:]})),
        lambda _own, drawn: (*drawn[:-1], 13),
        lambda _own, drawn: (0, *drawn[1:]),
    ],
    ids=["too few", "one twice", "out of order", "itself", "beyond the cohort", "before the cohort"],
)
def test_a_colluder_draws_what_nobody_can_draw(draw: Callable[[int, tuple[int, ...]], tuple[int, ...]]) -> None:
    """Holders that are no ``k`` others of the cohort are refused, also with a signature: a site that is its own holder,
    for one, would need one honest holder less.

    Stopped by ``check_neighbours``, at the sites and at the coordinator.
    """
    stopped, site, message = at_keys()
    colluder = message.advertisements[-1]
    drawn = draw(position(stopped, colluder.sender), colluder.neighbours)
    refuse(stopped, site, instead(message, signed(stopped, colluder, neighbours=drawn)), MalformedMessage, "neighbours")

    fresh = sparse(seed=1)
    _, honest = fresh.pending[11]
    assert isinstance(honest, SparseAdvertisement)
    with pytest.raises(MalformedMessage, match=r"site-011.*neighbours"):
        fresh.coordinator.receive(signed(fresh, honest, neighbours=draw(12, honest.neighbours)), sender=honest.sender)


def test_keys_of_a_site_that_is_no_neighbour() -> None:
    """A site deals with its neighbours only: the coordinator cannot add an edge.

    Stopped by the check of strangers in ``Participant._holders_and_dealers``.
    """
    stopped = sparse()
    everyone = stopped.until(SparseKeys)
    known = {item.sender: item for message in everyone.values() for item in message.advertisements}
    for site in stopped.sites:
        shown = {item.sender for item in everyone[site].advertisements}
        if strangers := sorted(known.keys() - shown):
            break
    added = (*everyone[site].advertisements, known[strangers[0]])
    refuse(stopped, site, replace(everyone[site], advertisements=added), UnexpectedMessage, "who is no neighbour")


def test_a_crowd_draws_one_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """More dealers than chance gives are refused.  Stopped by the bound in ``Participant._holders_and_dealers``."""
    stopped, site, message = at_keys()
    monkeypatch.setattr(participant, "MOST_DEALERS_PER_NEIGHBOUR", 0)
    refuse(stopped, site, message, UnexpectedMessage, r"\d sites that drew this one, expected at most 0")


def test_holders_hidden_at_the_keys() -> None:
    """A coordinator that hides so many holders that too few could reconstruct ends the round for the site.

    Stopped by ``Participant._need`` in ``Participant._share_secrets``.
    """
    stopped, site, message = at_keys()
    hidden = set(of(site, message).neighbours[:3])
    left = tuple(item for item in message.advertisements if position(stopped, item.sender) not in hidden)
    refuse(stopped, site, replace(message, advertisements=left), ThresholdNotMet, "5 holders who advertised, expected")


# --- the graph is cut ---


def at_delivery() -> tuple[StoppedRound, SiteId, SparseDelivery]:
    """A round at the share delivery, its first site, and its honest delivery."""
    stopped = sparse()
    site = stopped.sites[0]
    message = stopped.until(SparseDelivery)[site]
    assert isinstance(message, SparseDelivery)
    return stopped, site, message


def without(stopped: StoppedRound, message: SparseDelivery, hidden: set[int]) -> SparseDelivery:
    """The delivery that calls the sites at these positions dead."""
    return replace(
        message,
        sharers=tuple(place for place in message.sharers if place not in hidden),
        **{
            name: tuple(pair for pair in getattr(message, name) if position(stopped, pair[0]) not in hidden)
            for name in ("ciphertexts", "share_commitments")
        },
    )


def test_too_many_holders_called_dead() -> None:
    """With fewer than ``threshold`` holders said to have shared, the site sends no input.

    Stopped by ``Participant._need`` in ``Participant._take_shares``.
    """
    stopped, site, message = at_delivery()
    cut = without(stopped, message, set(message.sharers[:3]))
    refuse(stopped, site, cut, ThresholdNotMet, "5 holders who shared, expected at least 6")


def test_shares_of_a_site_that_did_not_draw_this_one() -> None:
    """Shares that a colluder seals for a site it did not draw are refused.

    Stopped by the check of senders in ``Participant._take_shares``.
    """
    stopped = sparse()
    deliveries = stopped.until(SparseDelivery)
    for site in stopped.sites:
        message = deliveries[site]
        assert isinstance(message, SparseDelivery)
        dealers = {name for name, _ in message.ciphertexts}
        if strangers := sorted(set(stopped.sites) - dealers - {site}):
            break
    extra = {
        name: tuple(sorted((*getattr(message, name), (strangers[0], b"x"))))
        for name in ("ciphertexts", "share_commitments")
    }
    refuse(stopped, site, replace(message, **extra), UnexpectedMessage, "of whom this site is no holder")


def test_sharers_that_are_no_holders() -> None:
    """The word on who shared is about the site's own holders only, each once.

    Stopped by the comparison in ``Participant._sites``.
    """
    for extra in ((1,), (13,), ()):
        stopped, site, message = at_delivery()
        sharers = tuple(sorted((*message.sharers, *extra))) if extra else message.sharers[::-1]
        refuse(stopped, site, replace(message, sharers=sharers), MalformedMessage, "only 8 of holders")


def test_two_halves() -> None:
    """A holder called dead to a site is shown the site as alive: it would reveal a self seed without a shared mask.

    Stopped by the look for the own position in ``Participant._check_statement``.
    """
    stopped = sparse()
    deliveries = stopped.until(SparseDelivery)
    site = stopped.sites[0]
    message = deliveries[site]
    assert isinstance(message, SparseDelivery)
    cut_off = message.sharers[-1]
    (given,) = stopped.answers(site, without(stopped, message, {cut_off}))
    assert isinstance(given, SparseInput)
    assert cut_off not in given.inclusion.neighbours
    stopped.deliver({peer: delivery for peer, delivery in deliveries.items() if peer != site})
    holder = stopped.sites[cut_off - 1]
    shown = SparseSurvivors(context=stopped.parameters.context, inclusions=(given.inclusion,))
    refuse(stopped, holder, shown, InconsistentSurvivors, "the statement of site-000 is not about this site")


def at_survivors(**options: Any) -> tuple[StoppedRound, SiteId, SparseSurvivors]:
    """A round at the inclusions, its first site, and what it is shown."""
    stopped = sparse(**options)
    site = stopped.sites[0]
    message = stopped.until(SparseSurvivors)[site]
    assert isinstance(message, SparseSurvivors)
    return stopped, site, message


def changed_first(
    change: Callable[[StoppedRound, Inclusion], Inclusion],
) -> tuple[StoppedRound, SiteId, SparseSurvivors]:
    """A round in which the first inclusion that the first site is shown is changed."""
    stopped, site, message = at_survivors()
    first, *others = message.inclusions
    return stopped, site, replace(message, inclusions=(change(stopped, first), *others))


def test_an_inclusion_that_the_coordinator_extends() -> None:
    """A statement that the coordinator adds a holder to does not verify.

    Stopped by ``check_signature`` in ``Participant._check_statement``.
    """
    stopped, site, message = changed_first(lambda _, first: replace(first, neighbours=(*first.neighbours, 13)))
    refuse(stopped, site, message, AuthenticationFailed, "does not verify")


def test_an_inclusion_of_another_round() -> None:
    """A statement of an earlier round is refused.  Stopped by the context in ``Participant._check_statement``."""
    stopped, site, message = changed_first(lambda s, first: signed(s, first, context=bytes(32)))
    refuse(stopped, site, message, AuthenticationFailed, "bound to another context")


def test_an_inclusion_of_a_site_that_dealt_nothing_here() -> None:
    """Only dealers can be survivors to a site: of others it has nothing to reveal.

    Stopped by the look into the held shares in ``Participant._acknowledge``.
    """
    stopped, site, message = changed_first(lambda s, first: signed(s, first, sender=s.sites[0]))
    refuse(stopped, site, message, InconsistentSurvivors, "site-000 survived without having dealt to this site")


def test_inclusions_twice() -> None:
    """One dealer is one survivor.  Stopped by the order of names in ``Participant._acknowledge``."""
    stopped, site, message = at_survivors()
    twice = (message.inclusions[0], *message.inclusions)
    refuse(stopped, site, replace(message, inclusions=twice), MalformedMessage, "repeat or are out of order")


# --- alive to some, dropped to others ---


def at_acknowledgements() -> tuple[StoppedRound, SiteId, AcknowledgementList]:
    """A round at the acknowledgements, its first site, and what it is shown."""
    stopped = sparse()
    site = stopped.sites[0]
    message = stopped.until(AcknowledgementList)[site]
    assert isinstance(message, AcknowledgementList)
    return stopped, site, message


def test_alive_to_some_and_dropped_to_others() -> None:
    """A site that is called dropped to three of its holders gets too few acknowledgements, and reveals nothing.

    With three shares of its mask key the coordinator is as far from six as with the other five of its self seed.
    Stopped by ``Participant._need`` in ``Participant._reveal_acknowledged``.
    """
    stopped = sparse()
    shown = stopped.until(SparseSurvivors)
    victim = stopped.sites[0]
    holders = [peer for peer, message in shown.items() if victim in {item.sender for item in message.inclusions}]
    for holder in holders[:3]:
        message = shown[holder]
        left = tuple(item for item in message.inclusions if item.sender != victim)
        shown[holder] = replace(message, inclusions=left)
    answers = {site: stopped.answers(site, message)[0] for site, message in shown.items()}
    own = [item for item in answers.values() if position(stopped, victim) in item.survivors]
    assert len(own) == 5
    request = AcknowledgementList(context=stopped.parameters.context, acknowledgements=tuple(own))
    refuse(stopped, victim, request, ThresholdNotMet, "5 acknowledgements, expected at least 6")


def test_an_acknowledgement_counted_twice() -> None:
    """One holder counts once.  Stopped by the order of names in ``Participant._reveal_acknowledged``."""
    stopped, site, message = at_acknowledgements()
    twice = (message.acknowledgements[0], *message.acknowledgements)
    refuse(stopped, site, replace(message, acknowledgements=twice), MalformedMessage, "repeat or are out of order")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda s, item: replace(item, survivors=(*item.survivors, 13)), AuthenticationFailed, "does not verify"),
        (lambda s, item: signed(s, item, context=bytes(32)), AuthenticationFailed, "bound to another context"),
        (lambda s, item: signed(s, item, survivors=item.survivors[1:]), InconsistentSurvivors, "not about this site"),
        (
            lambda s, item: signed(s, item, sender=SiteId("site-000")),
            InconsistentSurvivors,
            "site-000, who is no holder",
        ),
    ],
    ids=["forged", "of another round", "of others", "of no holder"],
)
def test_an_acknowledgement_that_is_none(
    change: Callable[[StoppedRound, Acknowledgement], Acknowledgement], error: type[Exception], text: str
) -> None:
    """An acknowledgement counts if a holder signed it in this round, about this site.

    Stopped by ``Participant._check_statement`` and the look for holders in ``Participant._reveal_acknowledged``.
    """
    stopped, site, message = at_acknowledgements()
    first, *others = message.acknowledgements
    changed = replace(message, acknowledgements=(change(stopped, first), *others))
    refuse(stopped, site, changed, error, text)


def test_shares_asked_for_twice() -> None:
    """A second request is answered by no site, also not by one that lost its memory but not its journal.

    Stopped by the ``_reveal`` step's note in the journal, made before anything leaves.
    """
    stopped, site, message = at_acknowledgements()
    stopped.journals[site].answer("run", 1)
    refuse(stopped, site, message, RoundReplayed, "was answered before")


def test_never_both_kinds_of_share_of_one_site() -> None:
    """Whatever the coordinator shows, an answer has one kind of share of each site.

    Held by the derivation of the dropouts in ``Participant._reveal``.
    """
    stopped, site, message = at_acknowledgements()
    (answer,) = stopped.answers(site, message)
    assert isinstance(answer, UnmaskShares)
    seeds, keys = ({name for name, _ in kind} for kind in (answer.self_seed_shares, answer.mask_key_shares))
    assert not seeds & keys
    assert isinstance(stopped.participants[site].phase, AwaitingReceipt)


# --- messages of the other graph ---


def test_messages_of_the_complete_graph() -> None:
    """In a sparse round a site takes no message of the complete graph, whose checks are other ones, and the reverse.

    Stopped by the tables of transitions, one for each graph, in ``Participant.receive``.
    """
    context = sparse().parameters.context
    for message in (
        CohortKeys(context=context, advertisements=()),
        SurvivorList(context=context, survivors=()),
        UnmaskRequest(context=context, list_signatures=()),
    ):
        stopped = sparse()
        refuse(stopped, stopped.sites[0], message, UnexpectedMessage, "has no place in this phase")
    complete = StoppedRound(4)
    keys = SparseKeys(context=complete.parameters.context, advertisements=())
    refuse(complete, complete.sites[0], keys, UnexpectedMessage, "has no place in this phase")


# --- a receipt that lies ---


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"canary": 11}, "12 survivors with canary 11"),
        ({"survivors": 6, "canary": 6}, "at least 7"),
        ({"neighbours": 6}, "6 neighbours and threshold 6, expected 8 and 6"),
        ({"threshold": 5}, "8 neighbours and threshold 5, expected 8 and 6"),
    ],
)
def test_a_receipt_that_lies(changes: dict[str, int], text: str) -> None:
    """A receipt for masks that did not cancel, too few survivors or another graph is refused.

    Stopped by the comparisons in ``Participant._take_sparse_receipt``.
    """
    stopped = sparse()
    site = stopped.sites[0]
    message = stopped.until(SparseReceipt)[site]
    assert isinstance(message, SparseReceipt)
    assert (message.survivors, message.neighbours, message.threshold) == (12, 8, 6)
    refuse(stopped, site, replace(message, **changes), InconsistentSurvivors, text)


def test_a_site_that_asks_for_more_than_the_graph_enforces() -> None:
    """A site whose own rule the graph cannot keep takes no part.  Stopped in ``Participant.__init__``."""
    stopped = sparse()
    for minimum, refused in ((7, False), (8, True)):
        options = {
            "site": stopped.sites[0],
            "identity": stopped.identities[stopped.sites[0]],
            "parameters": stopped.parameters,
            "journal": stopped.journals[stopped.sites[0]],
            "minimum_survivors": minimum,
        }
        if refused:
            with pytest.raises(ThresholdNotMet, match="a graph that enforces 7 survivors, expected at least 8"):
                participant.Participant(**options)  # type: ignore[arg-type]
        else:
            participant.Participant(**options)  # type: ignore[arg-type]


# --- a bad site, and an honest coordinator ---


def refused_and_finished(
    kind: type[SiteMessage], change: Callable[[StoppedRound, Any], SiteMessage], error: type[Exception], text: str
) -> None:
    """The coordinator refuses the last site's message of this kind, and the others finish without it."""
    stopped = sparse()
    bad = stopped.sites[11]
    while not any(isinstance(message, kind) for _, message in stopped.pending):
        stopped.deliver(stopped.collect())
    for site, message in [*stopped.pending]:
        if site == bad and isinstance(message, kind):
            with pytest.raises(error, match=text) as caught:
                stopped.coordinator.receive(change(stopped, message), sender=bad)
            assert bad in str(caught.value)
            stopped.pending.remove((site, message))
    stopped.finish()
    assert isinstance(stopped.coordinator.phase, CoordinatorFinished)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            lambda s, m: signed(s, m, inclusion=replace(m.inclusion, sender=s.sites[0])),
            AuthenticationFailed,
            "stated by",
        ),
        (
            lambda s, m: signed(s, m, inclusion=signed(s, m.inclusion, context=bytes(32))),
            AuthenticationFailed,
            "another context",
        ),
        (
            lambda s, m: signed(s, m, inclusion=replace(m.inclusion, signature=bytes(64))),
            AuthenticationFailed,
            "does not verify",
        ),
        (
            lambda s, m: signed(s, m, inclusion=signed(s, m.inclusion, neighbours=m.inclusion.neighbours[1:])),
            MalformedMessage,
            "7 holders included, expected 8",
        ),
    ],
    ids=["of another site", "of another round", "forged", "of too few"],
)
def test_a_site_with_a_false_inclusion(
    change: Callable[[StoppedRound, Any], SiteMessage], error: type[Exception], text: str
) -> None:
    """A false statement costs its sender the round and nobody else.  Stopped by ``Coordinator._check_inclusion``."""
    refused_and_finished(SparseInput, change, error, text)


def test_a_site_with_a_false_acknowledgement() -> None:
    """Acknowledging others than it was shown costs a site the round.

    Stopped by the comparison in ``Coordinator._collect_acknowledgement``.
    """
    refused_and_finished(
        Acknowledgement, lambda s, m: signed(s, m, survivors=m.survivors[1:]), MalformedMessage, "survivors, expected"
    )


def test_a_site_that_deals_to_others_than_it_drew() -> None:
    """Shares for other holders than advertised are refused.  Stopped by ``Coordinator._collect_shares``."""
    refused_and_finished(
        EncryptedShares,
        lambda s, m: signed(s, m, ciphertexts=m.ciphertexts[1:], share_commitments=m.share_commitments[1:]),
        MalformedMessage,
        "shares for 7 peers, expected 8",
    )


def test_a_site_that_no_one_could_recover_is_left_out() -> None:
    """Whoever has too few holders among the others takes no part, is told so, and the others' sum is exact.

    Held by ``Coordinator._recoverable``: its masks could never be removed.
    """
    stopped = sparse(minimum_survivors=2)
    drawn = dict(stopped.pending)
    victim = stopped.sites[0]
    others = [site for site in stopped.sites if position(stopped, site) in drawn[victim].neighbours]
    stopped.silent = dict.fromkeys(others[:3], SparseAdvertisement)
    try:
        stopped.finish()
    except RoundAborted:
        assert isinstance(stopped.participants[victim].phase, Aborted)
    phase = stopped.coordinator.phase
    assert isinstance(phase, CoordinatorFinished | Aborted)
    if isinstance(phase, CoordinatorFinished):
        assert victim not in phase.aggregate.survivors
