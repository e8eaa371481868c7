"""Write the NOTICE of the embedded data and model from the table of sources."""

from .sources import Source

HEAD = """NOTICE for the embedded benchmark and model (keeplora.mini)

The images in data/ and the weights in model/ were made from the works below. Each work keeps its licence; the
changes made are: rasterising, cropping, scaling to 64x64 pixels, compositing on coloured backgrounds at random
angles and sizes, and enlarging. None of the authors endorses this project.
"""
TASK_HEAD = "1. Works of which images are shipped in data/ (archives of tasks)"
MODEL_HEAD = "2. Works the weights in model/ were trained on (none of their images is shipped)"
MIT = """MIT licence (of the works marked MIT, copyright of the holders named above)

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
BSD = """BSD 3-clause licence (scikit-learn)

Copyright (c) 2007-2026 The scikit-learn developers. All rights reserved.

Redistribution and use in source and binary forms, with or without modification, are permitted provided that the
following conditions are met: (1) Redistributions of source code must retain the above copyright notice, this list of
conditions and the following disclaimer. (2) Redistributions in binary form must reproduce the above copyright notice,
this list of conditions and the following disclaimer in the documentation and/or other materials provided with the
distribution. (3) Neither the name of the copyright holder nor the names of its contributors may be used to endorse or
promote products derived from this software without specific prior written permission.

THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS" AND ANY EXPRESS OR IMPLIED WARRANTIES,
INCLUDING, BUT NOT LIMITED TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE
DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL,
SPECIAL, EXEMPLARY, OR CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR
SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER CAUSED AND ON ANY THEORY OF LIABILITY,
WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE OF
THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
"""
ISC = """ISC licence (Lucide; Copyright (c) Lucide Contributors, portions (c) Cole Bemis 2013-2022, Feather, MIT)

Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby granted,
provided that the above copyright notice and this permission notice appear in all copies. THE SOFTWARE IS PROVIDED
"AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES WITH REGARD TO THIS SOFTWARE INCLUDING ALL IMPLIED WARRANTIES OF
MERCHANTABILITY AND FITNESS. IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR ANY SPECIAL, DIRECT, INDIRECT, OR CONSEQUENTIAL
DAMAGES OR ANY DAMAGES WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN AN ACTION OF CONTRACT,
NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF OR IN CONNECTION WITH THE USE OR PERFORMANCE OF THIS SOFTWARE.
"""
REST = """Other terms

Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0 (the same text as this project's LICENSE).
CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/   CC-BY-3.0: https://creativecommons.org/licenses/by/3.0/
CC0-1.0: https://creativecommons.org/publicdomain/zero/1.0/
OFL-1.1, Bitstream Vera: no font software is shipped, only pictures of glyphs; https://openfontlicense.org/
aenigma fonts: their author, Brian Kent, allows everyone "to distribute your fonts further, without asking", "to create
new fonts" and "to make changes to your fonts, provided those changes are noted and the original fonts are still
attributed" to him (4 July 2008); the letters task shows their capitals, scaled, coloured and turned.
Symbola: "Fonts are free for any use; they may be opened, edited, modified, regenerated, packaged and redistributed."
Optical Recognition of Handwritten Digits: E. Alpaydin and C. Kaynak (1998), UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49, CC-BY-4.0.
The icons of game-icons.net are by Lorc, Delapouite, Skoll, sbed, Carl Olsen, DarkZaitzev and other contributors.
"""


def line(source: Source) -> str:
    """Return one work's line."""
    credit = f"Copyright {source.credit}" if source.credit[0].isdigit() else source.credit
    return f"- {credit}. {source.licence}. ({source.registry}: {source.package} {source.version})"


def text(every: list[Source]) -> str:
    """Return the NOTICE."""
    shown = [line(source) for source in every if source.use != "pretrain"]
    learned = [line(source) for source in every if source.use.endswith("pretrain")]
    parts = [HEAD, TASK_HEAD, "\n".join(shown), MODEL_HEAD, "\n".join(learned), "3. Licence texts", MIT, BSD, ISC, REST]
    return "\n\n".join(part.strip() for part in parts) + "\n"
