"""Takes the picture of the page that the docs show, from an endpoint that runs:

python -m tests.serve.page_picture --image data/shapes/images/test/000000.png -o docs/page.png
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile

from PIL import Image

from tests.serve.browser import Page, browser


def main() -> None:
    """Ask one question and save what the browser shows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000/", help="of the endpoint")
    parser.add_argument("--image", type=Path, required=True, help="that is asked about")
    parser.add_argument("--question", default="Describe the image.")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in pixels")
    parser.add_argument("--height", type=int, default=790, help="of the window; the page may be longer")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    with browser(options.width, options.height, options.dark) as driver:
        page = Page(driver, options.url)
        page.ready()
        # The first request pays for what is made once; it is about another image, which is not held for this.
        with NamedTemporaryFile(suffix=".png") as blank:
            Image.new("RGB", (224, 224), "grey").save(blank.name)
            page.ask(Path(blank.name), options.question)
        page.ask(options.image, options.question)
        page.point("g.merged rect")
        picture = Image.open(BytesIO(page.picture())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
