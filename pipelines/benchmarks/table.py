"""The rows of MMEB-V2 (78 datasets) and M-BEIR (16 tasks, each with a pool of its own and with the union of all pools).

Counts of queries are those of the protocol. A reader finds everything else it needs in the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pipelines.benchmarks.types import Modality, Row

HUB = "https://huggingface.co/datasets/"
META_TASKS = (
    *("image classification", "image QA", "image retrieval", "image grounding"),
    *("video classification", "video QA", "video retrieval", "moment retrieval"),
    "visual document retrieval",
)
"""The nine of MMEB-V2, in the order of its tables."""

_ANSWER = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question:"
)
_VIDEO = "Understand the content of the provided video."
_CLIP = "Understand the content of the provided video clip."


def _images() -> Iterator[Row]:
    """The instructions of image sets are in their rows."""
    names = {
        "image classification": "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R "
        "ObjectNet Country211",
        "image QA": "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA",
        "image retrieval": "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA FashionIQ "
        "Wiki-SS-NQ OVEN EDIS",
        "image grounding": "MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing",
    }
    for meta_task, group in names.items():
        for name in group.split():
            yield Row(
                name=name,
                suite="MMEB-V2",
                modality="image",
                meta_task=meta_task,
                pool="local",
                metric="hit@1",
                num_queries=1000,
                layout="image",
                data=f"image-tasks/{name}",
                media="image-tasks",
                source=f"{HUB}ziyjiang/MMEB_Test_Instruct/tree/main/{name}",
            )


def _video(name: str, meta_task: str, layout: str, num_queries: int, folder: str, **fields: object) -> Row:
    """A video set: lists in `video-tasks/{name}`, frames in `video-tasks/frames/{folder}`, `hub` where not `name`."""
    hub = fields.pop("hub", f"VLM2Vec/{name}")
    row = Row(
        name=name,
        suite="MMEB-V2",
        modality="video",
        meta_task=meta_task,
        pool="local",
        metric="hit@1",
        num_queries=num_queries,
        layout=layout,
        data=f"video-tasks/{str(hub).partition('/')[2]}",
        media=f"video-tasks/frames/{folder}",
        source=f"{HUB}{hub}",
    )
    return replace(row, **fields)  # type: ignore[arg-type]


def _videos() -> Iterator[Row]:
    for name, count, num_classes, instruction in (
        ("K700", 1000, 700, "Recognize the category of the video content."),
        ("HMDB51", 1000, 51, "What actions or objects interactions are the person in the video doing?"),
        ("UCF101", 1000, 101, "What activities or sports are being performed by the person in the video?"),
        ("Breakfast", 433, 10, "Recognize the breakfast type that the person is cooking in the video."),
    ):
        yield _video(
            *(name, "video classification", "video_class", count, f"video_cls/{name}"),
            pool="global",
            num_classes=num_classes,
            instruction=instruction,
            hub="VLM2Vec/Kinetics-700" if name == "K700" else f"VLM2Vec/{name}",
        )
    yield _video(
        *("SmthSmthV2", "video classification", "video_choice", 1000, "video_cls/SSv2"),
        instruction="What actions or object interactions are being performed by the person in the video?",
    )
    for name, count, subset in (
        ("MVBench", 4000, ""),
        ("Video-MME", 2700, ""),
        ("NExTQA", 8564, "MC"),
        ("EgoSchema", 500, "Subset"),
        ("ActivityNetQA", 1000, ""),
    ):
        yield _video(
            *(name, "video QA", "video_qa", count, f"video_qa/{name}"),
            subset=subset,
            split="train" if name == "MVBench" else "test",
            instruction=_ANSWER,
        )
    recipe = "Find a video that demonstrates the following action while making a recipe:"
    for name, count, id_column, text_column, instruction in (
        ("DiDeMo", 1004, "video", "caption", "Find a video that includes the following described scenes:"),
        ("MSR-VTT", 1000, "video_id", "caption", "Find a video that contains the following visual content:"),
        ("MSVD", 670, "video_id", "caption", "Find the video snippet that corresponds to the given summary:"),
        ("VATEX", 4478, "videoID", "enCap", "Select a video that fits the description provided:"),
        ("YouCook2", 3179, "id", "sentence", recipe),
    ):
        yield _video(
            *(name, "video retrieval", "video_retrieval", count, f"video_ret/{name}"),
            pool="global",
            subset="test_1k" if name == "MSR-VTT" else "",
            split="val" if name == "YouCook2" else "test",
            id_column=id_column,
            text_column=text_column,
            instruction=instruction,
            target_instruction=_VIDEO,
            hub="lmms-lab/YouCook2" if name == "YouCook2" else f"VLM2Vec/{name}",
        )
    for name, count, folder in (("QVHighlight", 1083, "QVHighlight"), ("Charades-STA", 727, "Charades_STA")):
        yield _video(
            *(name, "moment retrieval", "moment", count, f"video_mret/{folder}"),
            instruction="Find the clip that corresponds to the described scene in the given video:",
            target_instruction=_VIDEO,
        )
    yield _video(
        *("MomentSeeker", "moment retrieval", "moment_seeker", 1602, "video_mret/MomentSeeker"),
        instruction="Find the clip that corresponds to the given text:",
        target_instruction=_CLIP,
        revision="without its repeated queries (1602 of 1800), as of July 2025",
    )


def _documents() -> Iterator[Row]:
    # name, queries, folder of the hub, folder of the images where it is not the name, what else differs
    v1 = {"arxivqa": 500, "docvqa": 451, "infovqa": 494, "tabfquad": 280, "tatdqa": 1646, "shiftproject": 100}
    topics = ("artificial_intelligence", "energy", "government_reports", "healthcare_industry")
    v1 |= {f"syntheticDocQA_{topic}": 100 for topic in topics}
    for name, count in v1.items():
        sampled = "_subsampled" if name in ("arxivqa", "docvqa", "infovqa", "tabfquad") else ""
        yield _pages(f"ViDoRe_{name}", count, f"vidore/{name}_test{sampled}_beir")
    for name, count, hub in (
        ("esg_reports_human_labeled_v2", 52, "esg_reports_human_labeled_v2"),
        ("biomedical_lectures_v2_multilingual", 640, "biomedical_lectures_v2"),
        ("economics_reports_v2_multilingual", 232, "economics_reports_v2"),
        ("esg_reports_v2_multilingual", 228, "esg_reports_v2"),
    ):
        yield replace(_pages(f"ViDoRe_{name}", count, f"vidore/{hub}"), media=f"visdoc-tasks/{name}")
    visrag = {"ArxivQA": 816, "ChartQA": 63, "MP-DocVQA": 591, "SlideVQA": 556, "InfoVQA": 718, "PlotQA": 863}
    for name, count in visrag.items():
        row = _pages(f"VisRAG_{name}", count, f"openbmb/VisRAG-Ret-Test-{name}")
        yield replace(row, layout="pages_short", split="train")
    for name, count in (("ViDoSeek", 1142), ("MMLongBench", 838)):
        # Pictures of the set before its repair have the same names: they must not be taken for these.
        fixed = _pages(f"{name}-page", count, f"VLM2Vec/{name}-page-fixed")
        yield replace(fixed, media=f"visdoc-tasks/{name}-page-fixed", revision="page-fixed, as of November 2025")
        yield _pages(f"{name}-doc", count, f"VLM2Vec/{'ViDoSeek' if name == 'ViDoSeek' else 'MMLongBench-doc'}")


def _pages(name: str, num_queries: int, hub: str) -> Row:
    return Row(
        name=name,
        suite="MMEB-V2",
        modality="visdoc",
        meta_task="visual document retrieval",
        pool="global",
        metric="ndcg_linear@5",
        num_queries=num_queries,
        layout="pages",
        data=f"visdoc-tasks/{hub.partition('/')[2]}",
        media=f"visdoc-tasks/{name}",
        source=f"{HUB}{hub}",
        instruction="Find a document image that matches the given query:",
        target_instruction="Understand the content of the provided document image.",
    )


def _mbeir() -> Iterator[Row]:
    # name, meta-task, test queries (UniIR paper, table 1). What its authors call recall@k is hit@k.
    for name, meta_task, count in (
        ("visualnews_task0", "text → image", 19995),
        ("mscoco_task0", "text → image", 24809),
        ("fashion200k_task0", "text → image", 1719),
        ("webqa_task1", "text → text", 2455),
        ("edis_task2", "text → image+text", 3241),
        ("webqa_task2", "text → image+text", 2511),
        ("visualnews_task3", "image → text", 20000),
        ("mscoco_task3", "image → text", 5000),
        ("fashion200k_task3", "image → text", 4889),
        ("nights_task4", "image → image", 2120),
        ("oven_task6", "image+text → text", 50004),
        ("infoseek_task6", "image+text → text", 11323),
        ("fashioniq_task7", "image+text → image", 6003),
        ("cirr_task7", "image+text → image", 4170),
        ("oven_task8", "image+text → image+text", 14741),
        ("infoseek_task8", "image+text → image+text", 17593),
    ):
        yield Row(
            name=name,
            suite="M-BEIR",
            modality="mixed",
            meta_task=meta_task,
            pool="local",
            metric="hit@10" if name.startswith("fashion") else "hit@5",
            num_queries=count,
            layout="mbeir",
            # MS-COCO has one pool for validation and another for the test.
            subset=f"{name}_test" if name.startswith("mscoco") else name,
            source=f"{HUB}TIGER-Lab/M-BEIR",
        )


MMEB_V2: dict[str, Row] = {row.name: row for group in (_images, _videos, _documents) for row in group()}
M_BEIR: dict[str, Row] = {row.name: row for row in _mbeir()}
M_BEIR_GLOBAL: dict[str, Row] = {
    name: replace(row, suite="M-BEIR global", pool="global", subset="union") for name, row in M_BEIR.items()
}
SUITES: dict[str, dict[str, Row]] = {"MMEB-V2": MMEB_V2, "M-BEIR": M_BEIR, "M-BEIR global": M_BEIR_GLOBAL}
MODALITIES: tuple[Modality, ...] = ("image", "video", "visdoc")
"""The datasets of MMEB-V2, in the order of its tables."""
_SUBMITTED = {"ViDoSeek-page": "ViDoSeek-page-fixed", "MMLongBench-page": "MMLongBench-page-fixed"}


def submitted_name(row: Row) -> str:
    """The dataset's name in a submission to the leaderboard of MMEB-V2."""
    return _SUBMITTED.get(row.name, row.name)
