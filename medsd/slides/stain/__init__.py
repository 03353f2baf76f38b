"""The stain of a slide: fitted once, kept as numbers, normalised to that of a target, changed in training."""

from medsd.slides.stain.profile import METHODS as METHODS
from medsd.slides.stain.profile import LabColours as LabColours
from medsd.slides.stain.profile import Method as Method
from medsd.slides.stain.profile import StainProfile as StainProfile
from medsd.slides.stain.profile import TwoStains as TwoStains
from medsd.slides.stain.profile import fit_picture as fit_picture
from medsd.slides.stain.profile import profile_from_dict as profile_from_dict
from medsd.slides.stain.profile import profile_from_file as profile_from_file
from medsd.slides.stain.profile import transform_between as transform_between
