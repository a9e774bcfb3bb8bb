"""Ask a trained model and its base the same question, side by side, on a page in your browser.

    pip install -r requirements/requirements_web.txt
    python tutorial/web_demo.py --model-name-or-path ./smollm2_korean_numbers

Open the address that it prints; Ctrl-C ends it. Only this machine can open the page, which needs no network; --share
makes it public. Base and dataset file are those of the training's run.json. The examples are held-out rows.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from urllib.request import getproxies

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import Parser, add_bits, find_base_and_dataset
from common.support.exit import UserError, run

MAX_NEW_TOKENS = 256  # as in inference_*


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model-name-or-path", default="./smollm2_korean_numbers", help="directory of the trained model or adapter")
    add("--base-model-name-or-path", help="the model before the training (default: as run.json beside the model says)")
    add("--dataset-name-or-path", help="dataset file with the held-out rows (default: as run.json says)")
    add("--share", action="store_true", help="also make the page public, at an address of gradio.live")
    add_bits(parser, "load the models, or the adapter's base, in 4 bit")
    args = parser.parse_args()
    if sys.version_info < (3, 10):
        raise UserError("Gradio 6, which makes the page, needs Python 3.10 or newer. Use tutorial/inference_* instead.")
    find_base_and_dataset(args)

    # Imported here, so that --help and a mistyped option are answered at once.
    from common.device import start_device
    from common.support.compat import require_package
    from common.tokenization import load_tokenizer_of_both
    from dataset.questions import Asker
    from model.pair import load_pair

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would report to Gradio's makers
    os.environ["no_proxy"] = f"127.0.0.1,{getproxies().get('no', '')}"  # Gradio calls its own page as it starts
    require_package("gradio", (6, 0), "The page")
    model_dir, base = args.model_name_or_path, args.base_model_name_or_path
    device = start_device(seed=0)
    asker = Asker(model_dir, load_tokenizer_of_both(model_dir, base))
    page, look = make_page(args, asker, load_pair(model_dir, base, device, args.bits))
    if args.share:
        print("Warning: with --share, everybody who has the public address of gradio.live can use the model.")
    page.launch(server_name="127.0.0.1", share=args.share, quiet=True, prevent_thread_lock=True, **look)
    print(f"Open {page.local_url} in your browser. Ctrl-C ends it.")
    while True:
        time.sleep(1)


def make_page(args, asker, pair):
    """The page, and options of its launch. Models and data write into text boxes alone, where HTML stays text."""
    import gradio as gr

    from model.pair import Dialogue

    def ask(dialogue, text, *options):
        yield "…", "…"
        try:
            for _ in dialogue.ask(pair, asker, text, *options):
                yield tuple(map(show, dialogue.talks))
        except UserError as error:
            yield f"error: {error}", ""

    def show(talk):
        texts = ["…" if message["content"] is None else message["content"] for message in talk]
        texts[::2] = [f"> {question}" for question in texts[::2]]
        return "\n\n".join(texts if asker.chat_template else texts[-1:])

    def begin_again(dialogue, row=None):
        dialogue.talks = [[], []]
        return *(("", "") if row is None else examples[row]), "", ""

    is_new, examples = asker.examples(args.dataset_name_or_path, MAX_NEW_TOKENS)
    samples = [[question] for question, _ in examples[:6]]
    with gr.Blocks(title="학습 전과 후의 답", analytics_enabled=False) as page:
        gr.Markdown("## 같은 질문, 학습 전과 후의 답")
        dialogue = gr.State(Dialogue())
        label = "학습에 쓰지 않은 질문" if is_new else "데이터셋의 질문 (학습에 썼을 수 있음)"
        example = gr.Dataset(components=["textbox"], samples=samples, type="index", label=label, visible=bool(samples))
        question = gr.Textbox(label="질문", autofocus=True)
        reference = gr.Textbox(label="데이터의 정답", interactive=False, visible=bool(samples))
        with gr.Row():
            start = gr.Button("질문하기", variant="primary", min_width=80)
            stop, clear = gr.Button("중지", min_width=80), gr.Button("지우기", min_width=80)
        with gr.Row():
            style = {"lines": 6, "max_lines": 200, "interactive": False, "min_width": 280}
            base = gr.Textbox(label=f"학습 전: {args.base_model_name_or_path}", **style)
            trained = gr.Textbox(label=f"학습 후: {args.model_name_or_path}", **style)
        with gr.Accordion("옵션", open=False):
            limit = gr.Slider(1, 2048, MAX_NEW_TOKENS, precision=0, label="답의 최대 토큰 수 (넘으면 끊깁니다)")
            temperature = gr.Slider(0, 2, 0, label="temperature (0: 확률이 가장 높은 토큰만)")
            seed = gr.Slider(0, 9999, 0, precision=0, label="seed")
            system = gr.Textbox(label="시스템 메시지", visible=bool(asker.chat_template))
        always = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "multiple"}
        at_once, queue = {"queue": False, **always}, {"concurrency_id": "models", "concurrency_limit": 1, **always}
        options, fields = [dialogue, question, limit, temperature, seed, system], [question, reference, base, trained]
        # Whatever is done ends the answer under way, and waits in the queue until it has ended.
        asked = gr.on([question.submit, start.click], Dialogue.stop, dialogue, **at_once)
        asked.then(ask, options, [base, trained], **queue)
        stop.click(Dialogue.stop, dialogue, **at_once)
        clear.click(Dialogue.stop, dialogue, **at_once).then(begin_again, dialogue, fields, **queue)
        example.click(Dialogue.stop, dialogue, **at_once).then(begin_again, [dialogue, example], fields, **queue)
        question.input(lambda: "", None, reference, **at_once)  # what is typed has no answer in the data
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # fonts of the machine
    return page, {"theme": theme, "footer_links": [], "enable_monitoring": False, "run_history": False}


if __name__ == "__main__":
    run(main)
