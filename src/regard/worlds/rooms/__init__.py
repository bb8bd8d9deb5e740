"""Rooms ray-cast in 3-D: several calibrated views with exact depth, surfaces, correspondences, flow, occupancy."""

from regard.worlds.rooms.cameras import Camera as Camera
from regard.worlds.rooms.houses import Houses as Houses
from regard.worlds.rooms.rooms import RingRooms as RingRooms
from regard.worlds.rooms.rooms import Room as Room
from regard.worlds.rooms.rooms import RoomClips as RoomClips
from regard.worlds.rooms.rooms import Rooms as Rooms
from regard.worlds.rooms.rooms import StereoRooms as StereoRooms
from regard.worlds.rooms.scene import Scene as Scene
from regard.worlds.rooms.views import View as View
from regard.worlds.rooms.views import render as render
