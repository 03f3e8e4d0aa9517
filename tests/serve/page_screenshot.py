"""Take the screenshot of the page in the docs, from a running endpoint:

python -m tests.serve.page_screenshot --image data/shapes/images/test/000000.png -o docs/images/page.png
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile

from PIL import Image

from tests.serve.browser import Page, browser


def main() -> None:
    """Ask one question and save a screenshot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000/", help="URL of the endpoint")
    parser.add_argument("--image", type=Path, required=True, help="image of the question")
    parser.add_argument("--question", default="Describe the image.")
    parser.add_argument("--width", type=int, default=1280, help="width of the window (pixels)")
    parser.add_argument(
        "--height", type=int, default=790, help="height of the window (pixels); the page may be longer"
    )
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    with browser(options.width, options.height, options.dark) as driver:
        page = Page(driver, options.url)
        page.ready()
        # Warm up with another image: the times then include neither one-time costs nor a cache hit.
        with NamedTemporaryFile(suffix=".png") as blank:
            Image.new("RGB", (224, 224), "grey").save(blank.name)
            page.ask(Path(blank.name), options.question)
        page.ask(options.image, options.question)
        page.point("g.merged rect")
        image = Image.open(BytesIO(page.screenshot())).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
