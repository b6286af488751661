"""What the classes of a reference model are called: its files seldom say."""

from __future__ import annotations

import re

from tvit_cli.errors import ModelError
from tvit_cli.model.families import Config
from tvit_cli.model.folder import CONFIG_FILE
from tvit_cli.model.weights import WeightsSource

# UCF101's class folders, sorted as the reference sorts them: capitals first.
_UCF101 = """
ApplyEyeMakeup ApplyLipstick Archery BabyCrawling BalanceBeam BandMarching BaseballPitch Basketball
BasketballDunk BenchPress Biking Billiards BlowDryHair BlowingCandles BodyWeightSquats Bowling
BoxingPunchingBag BoxingSpeedBag BreastStroke BrushingTeeth CleanAndJerk CliffDiving CricketBowling CricketShot
CuttingInKitchen Diving Drumming Fencing FieldHockeyPenalty FloorGymnastics FrisbeeCatch FrontCrawl GolfSwing
Haircut HammerThrow Hammering HandstandPushups HandstandWalking HeadMassage HighJump HorseRace HorseRiding
HulaHoop IceDancing JavelinThrow JugglingBalls JumpRope JumpingJack Kayaking Knitting LongJump Lunges
MilitaryParade Mixing MoppingFloor Nunchucks ParallelBars PizzaTossing PlayingCello PlayingDaf PlayingDhol
PlayingFlute PlayingGuitar PlayingPiano PlayingSitar PlayingTabla PlayingViolin PoleVault PommelHorse PullUps
Punch PushUps Rafting RockClimbingIndoor RopeClimbing Rowing SalsaSpin ShavingBeard Shotput SkateBoarding
Skiing Skijet SkyDiving SoccerJuggling SoccerPenalty StillRings SumoWrestling Surfing Swing TableTennisShot
TaiChi TennisSwing ThrowDiscus TrampolineJumping Typing UnevenBars VolleyballSpiking WalkingWithDog
WallPushups WritingOnBoard YoYo
"""
UCF101 = tuple(_UCF101.split())


def named_labels(source: WeightsSource, written: Config, count: int) -> tuple[str, ...] | None:
    """The classes that the config names; None where it has no names but transformers' own, LABEL_0 …"""
    named = written.get("id2label")
    if named is None:
        return None
    if isinstance(named, dict) and all(re.fullmatch(r"LABEL_\d+", str(name)) for name in named.values()):
        return None
    keys = [str(number) for number in range(count)]
    if not isinstance(named, dict) or set(named) != set(keys) or len(set(map(str, named.values()))) < count:
        raise ModelError(
            f"{source.name}: id2label in {CONFIG_FILE} must have a name of its own for each class, 0 to "
            f"{count - 1}. Mend it, or remove it."
        )
    return tuple(str(named[key]) for key in keys)


def guessed_labels(count: int) -> tuple[tuple[str, ...], list[str]]:
    """Labels for so many classes without names, and a sentence on what was taken."""
    if count == len(UCF101):
        return UCF101, [
            f"The weights do not name their {count} classes: UCF101's are taken, in sorted order."
        ]
    note = (
        f"The weights do not name their {count} classes: they are numbered, in the sorted order of the folders "
        f'that they were trained on. "id2label" in a {CONFIG_FILE} beside the weights names them.'
    )
    return tuple(f"class {n}" for n in range(count)), [note]
