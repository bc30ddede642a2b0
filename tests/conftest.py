"""What holds for all tests: nothing phones home."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # img2dataset's image library asks for its newest version at import
