"""What the scripts in the root use. Arrows point down: a script uses this package, which is handed its model.

Scripts import it before torch, which takes seconds and reads the environment: what goes wrong meanwhile is told as a
sentence already.
"""

from nanofit.allocator import prefer_expandable_segments
from nanofit.errors import show_errors_as_sentences

show_errors_as_sentences()
prefer_expandable_segments()
