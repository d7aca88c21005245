"""Trainable attention modules: published methods, full attention and multi-granular attention behind one interface."""

from mgam.nn.base import SelfAttention, State
from mgam.nn.bigbird import BigBirdAttention
from mgam.nn.cca import CoreContextAttention
from mgam.nn.cross import CrossAttention, FullCrossAttention, MultiGranularCrossAttention, PerformerCrossAttention
from mgam.nn.dga import DynamicGroupAttention
from mgam.nn.full import FullAttention
from mgam.nn.granular import MultiGranularAttention
from mgam.nn.learned import LearnedGranularAttention
from mgam.nn.linformer import LinformerAttention
from mgam.nn.local import LocalAttention
from mgam.nn.longformer import LongformerAttention
from mgam.nn.moba import MobaAttention
from mgam.nn.models import CrossReader, Decoder, Encoder
from mgam.nn.nsa import NativeSparseAttention
from mgam.nn.performer import PerformerAttention
from mgam.nn.reformer import ReformerAttention
from mgam.nn.sparse import window_of

__all__ = [
    "BigBirdAttention",
    "CoreContextAttention",
    "CrossAttention",
    "CrossReader",
    "Decoder",
    "DynamicGroupAttention",
    "Encoder",
    "FullAttention",
    "FullCrossAttention",
    "LearnedGranularAttention",
    "LinformerAttention",
    "LocalAttention",
    "LongformerAttention",
    "MobaAttention",
    "MultiGranularAttention",
    "MultiGranularCrossAttention",
    "NativeSparseAttention",
    "PerformerAttention",
    "PerformerCrossAttention",
    "ReformerAttention",
    "SelfAttention",
    "State",
    "window_of",
]
