"""Plant known defects, one at a time, in a copy of the tree: each must turn a test red.

A defect is a text that stands exactly once in a file, and what takes its place. When the code moves on and the text is
gone, plant the defect anew here.

Usage: mutants.py          plant them and run the tests
       mutants.py WORD...  only those with one of these words in their title or file
       mutants.py --check  only see that every text stands once
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Defect(NamedTuple):
    title: str
    file: str
    right: str
    wrong: str

    @property
    def package(self) -> str:
        return self.file.split("/")[1]


DEFECTS = [
    Defect(
        "a failed copy becomes visible",
        "crates/kvortex/src/planner.rs",
        "if succeeded =>",
        "if succeeded || true =>",
    ),
    Defect(
        "a lease ends at once",
        "crates/kvortex/src/index/mod.rs",
        "        Lease::new(Held::new(Arc::clone(self), run.handles), run.slots)\n",
        "        self.release(&run.handles);\n        Lease::new(Held::new(Arc::clone(self), Vec::new()), run.slots)\n",
    ),
    Defect(
        "the head of a prefix goes before its tail",
        "crates/kvortex/src/index/reservation.rs",
        "locked.publish(handle.node, claim, newest - Stamp::from(handle.rank))",
        "locked.publish(handle.node, claim, newest + Stamp::from(handle.rank))",
    ),
    Defect(
        "the same tokens have the same key wherever they stand",
        "crates/kvortex/src/key.rs",
        "message.set(0, &key);\n        self.keys.extend_from_slice(&key);",
        "self.keys.extend_from_slice(&key);",
    ),
    Defect(
        "targets that overlap are written",
        "crates/kvortex-mem/src/copy/transfer.rs",
        "pages.first_overlap().map_or(",
        "None::<(usize, usize)>.map_or(",
    ),
    Defect(
        "a slot is given back twice",
        "crates/kvortex-mem/src/slots.rs",
        "claim.pool = None;",
        "",
    ),
    Defect(
        "the end of a transfer is not copied",
        "crates/kvortex-mem/src/copy/job.rs",
        "(index < self.cut.grains).then",
        "(index + 1 < self.cut.grains.max(2)).then",
    ),
    Defect(
        "memory is still held when its copy is reported",
        "crates/kvortex-mem/src/copy/job.rs",
        "let transfer = self.transfer.lock().take();",
        "let transfer = self.transfer.lock().clone();",
    ),
    Defect(
        "free neighbours are not joined",
        "crates/kvortex-mem/src/pool.rs",
        "self.free.get(&end)",
        "self.free.get(&usize::MAX)",
    ),
    Defect(
        "a double free is taken for a foreign pointer",
        "crates/kvortex-mem/src/pool.rs",
        "self.freed.insert(offset);",
        "",
    ),
    Defect(
        "a load does not wait for the store that reads its pages",
        "crates/kvortex-mem/src/copy/gpu/control.rs",
        "let (id, earlier) = (self.next, self.scoreboard.before(&access, how));",
        "let (id, earlier) = (self.next, Vec::new());",
    ),
    Defect(
        "a save does not wait for what its stream computes",
        "crates/kvortex-mem/src/copy/gpu/pilot.rs",
        "load.after.iter().try_for_each(|event| event.hold(self.streams.raw(task.page_role())))",
        "load.after.iter().take(0).try_for_each(|event| event.hold(self.streams.raw(task.page_role())))",
    ),
    Defect(
        "a fence lets streams pass",
        "crates/kvortex-mem/src/copy/gpu/control.rs",
        "            self.start_through(id);\n            self.hold(stream, id)?;\n",
        "            self.start_through(id);\n",
    ),
    Defect(
        "a transfer ends with its last flight",
        "crates/kvortex-mem/src/copy/gpu/control.rs",
        "request.ends.extend(started.ends.iter().cloned());",
        "request.ends = started.ends.clone();",
    ),
    Defect(
        "the slots of a load that failed halfway are let go at once",
        "crates/kvortex-mem/src/copy/gpu/pilot.rs",
        "[task.slot_role(), task.page_role()]",
        "[task.page_role()]",
    ),
    Defect(
        "a staging buffer is filled again before it was drained",
        "crates/kvortex-mem/src/copy/gpu/program.rs",
        "            self.ops.push(Op::Claim { on: first, half });\n",
        "",
    ),
    Defect(
        "parts of unequal length share their rows",
        "crates/kvortex-mem/src/copy/gpu/program.rs",
        "RowKey { distances: distances.key(), steps, staged, transfer }",
        "RowKey { distances: distances.key(), steps, staged: None, transfer }",
    ),
    Defect(
        "a failed copy counts as loaded",
        "crates/kvortex-mem/src/copy/gpu/control.rs",
        "(None, Some(failure)) => Err(MemError::CopyFailed(failure.to_string())),",
        "(None, Some(_)) => Ok(()),",
    ),
    Defect(
        "memory of a device pool is given back twice",
        "crates/kvortex-mem/src/device_pool.rs",
        "self.freed.insert(addr);",
        "",
    ),
    Defect(
        "a save whose load failed becomes visible",
        "crates/kvortex/src/flight.rs",
        "this.arrive(if ok { Ok(()) } else { Err(broken()) })",
        "this.arrive(if ok || true { Ok(()) } else { Err(broken()) })",
    ),
    Defect(
        "the profile of another link is believed",
        "crates/kvortex/src/profile.rs",
        "(told == (TITLE, identity) && lines.next().is_none())",
        "(told.0 == TITLE && lines.next().is_none())",
    ),
    Defect(
        "a window is taken for a token shorter than it is",
        "crates/kvortex/src/ranks/groups.rs",
        "(blocks * self.block_tokens + 1).saturating_sub(window)",
        "(blocks * self.block_tokens + 2).saturating_sub(window)",
    ),
    Defect(
        "a hit needs only the last block of a window",
        "crates/kvortex/src/ranks/hybrid.rs",
        "let start = self.groups.first_read(self.group, hit).max(self.first);",
        "let start = self.groups.first_read(self.group, hit).max(self.first).max(hit - 1);",
    ),
    Defect(
        "all groups have the same keys",
        "crates/kvortex/src/ranks/groups.rs",
        "if group == 0 {",
        "if group < 99 {",
    ),
    Defect(
        "a block from the disk lands without a look at its digest",
        "crates/kvortex/src/tier/disk/volume.rs",
        "if digest_slot(&self.arena, landing.slot()) == Some(read.entry.digest) && !self.is_off() {",
        "if !self.is_off() {",
    ),
    Defect(
        "a block on the disk is another model's",
        "crates/kvortex/src/tier/disk/header.rs",
        "match (slab == common.slab, identity == common.identity) {",
        "match (slab == common.slab, true) {",
    ),
    Defect(
        "the header of a block is written before the block",
        "crates/kvortex/src/tier/disk/writer.rs",
        "            return self.settle();\n        }\n"
        "        self.opened.io.submit(ops);\n    }\n\n    fn payload_ended",
        "            return self.settle();\n        }\n"
        "        for i in 0..ops.len() {\n"
        "            let early = Op { done: Box::new(|_| ()), ..self.header_op(vec![i]) };\n"
        "            self.opened.io.submit(vec![early]);\n"
        "        }\n"
        "        self.opened.io.submit(ops);\n    }\n\n    fn payload_ended",
    ),
    Defect(
        "a file on the disk grows by one segment too many",
        "crates/kvortex/src/tier/disk/writer.rs",
        "if segments >= geometry.segments_in(usable(volume.options.max_bytes)) {",
        "if segments > geometry.segments_in(usable(volume.options.max_bytes)) {",
    ),
    Defect(
        "the slot of a block that goes to the disk is let go of before it is written",
        "crates/kvortex/src/tier/disk/writer.rs",
        "Block { offer: Some(offer), key,",
        "Block { offer: Some(Offer { keep: Arc::new(()), ..offer }), key,",
    ),
    Defect(
        "a reset does not reach the disk",
        "crates/kvortex/src/tier/disk/mod.rs",
        "self.volumes.iter().filter(|volume| !volume.clear()).count() == 0",
        "true",
    ),
    Defect(
        "what was written before a clear of the disk is believed after it",
        "crates/kvortex/src/tier/disk/open.rs",
        "opened.common.lock().slab = fresh_slab();",
        "",
    ),
    Defect(
        "the head of a prompt leaves the disk before its tail",
        "crates/kvortex/src/tier/disk/volume.rs",
        "queue.offers.extend(batch.into_iter().rev().map(",
        "queue.offers.extend(batch.into_iter().map(",
    ),
    Defect(
        "a tier that hangs is asked again and again",
        "crates/kvortex/src/tier/guard/mod.rs",
        "        (0..late).for_each(|_| self.tell(false));\n",
        "        let _ = late;\n",
    ),
]


def copy_tree(target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


def failures(tree: Path, package: str) -> list[str]:
    """Names of the tests that fail in the first program that has any; to hang or not to compile counts too."""
    # A defect may loop and allocate without end.
    command = [
        "prlimit",
        "--as=8589934592",
        "cargo",
        "test",
        "-q",
        "--locked",
        "-p",
        package,
        "--lib",
        "--tests",
    ]
    environment = os.environ | {"CARGO_TARGET_DIR": str(tree.parent / "target")}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return ["(it hung)"]
    named = sorted(set(re.findall(r"^    ([a-z_][\w:]*)$", done.stdout.partition("failures:")[2], re.MULTILINE)))
    return named or (["(it ended badly)"] if done.returncode else [])


def check() -> None:
    for defect in DEFECTS:
        count = (ROOT / defect.file).read_text(encoding="utf-8").count(defect.right)
        if count != 1:
            sys.exit(f"{defect.file} has {count} times {defect.right!r}, not once; to plant: {defect.title}")


def plant(tree: Path, defect: Defect) -> list[str]:
    file = tree / defect.file
    right = file.read_text(encoding="utf-8")
    file.write_text(right.replace(defect.right, defect.wrong), encoding="utf-8")
    try:
        return failures(tree, defect.package)
    finally:
        file.write_text(right, encoding="utf-8")


def chosen(words: list[str]) -> list[Defect]:
    found = [defect for defect in DEFECTS if any(word in defect.title + defect.file for word in words or [""])]
    return found or sys.exit(f"no defect has any of these words: {', '.join(words)}")


def main() -> int:
    check()
    if sys.argv[1:] == ["--check"]:
        return 0
    defects = chosen(sys.argv[1:])
    tree = copy_tree(Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "mutants/tree")
    for package in sorted({defect.package for defect in defects}):
        if red := failures(tree, package):
            sys.exit(f"{package} is red without any defect: {', '.join(red)}")
    survivors = 0
    for defect in defects:
        red = plant(tree, defect)
        survivors += not red
        print(f"{defect.title}: {', '.join(red[:3]) or 'NOBODY NOTICED'}{' ...' if len(red) > 3 else ''}", flush=True)
    print(f"{len(defects) - survivors} of {len(defects)} defects noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
