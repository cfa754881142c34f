"""Weights with two processes: each reads what its devices hold, and both see the same model; one writes."""

from test_distributed import run_processes
from tiny_architectures import make_params, tiny

from redco_like.models import build_model, save


def test_two_processes_load_and_save_one_model(tmp_path):
    config = tiny("mixtral-8x7b")
    save(tmp_path / "m", config, make_params(build_model(config).init_fn))
    outputs = run_processes(
        """
        with Deployer(None, distributed=explicit, deadline_seconds=60):
            from redco_like.models import WeightsError, load, save
            from redco_like.models.weights.files import open_checkpoint

            read = []
            count = lambda done, total: read.append((done, total))
            whole = sum(tensor.bytes for tensor in open_checkpoint(folder / "m").values())
            loaded = load(folder / "m", plan="fsdp", mesh="fsdp=4,expert=2", progress=count)
            alone = load(folder / "m").params
            for one, mine in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(alone), strict=True):
                assert len(one.addressable_shards) == 4 and len(one.sharding.device_set) == 8
                for shard in one.addressable_shards:
                    np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(mine)[shard.index])
            assert read[-1][0] == read[-1][1] < whole, (read[-1], whole)

            save(folder / "again", loaded.model, loaded.params, shard_bytes=20_000)
            again = load(folder / "again").params
            for one, two in zip(jax.tree.leaves(alone), jax.tree.leaves(again), strict=True):
                np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
            try:
                save(folder / "again", loaded.model, loaded.params)
            except WeightsError as error:
                print("REFUSED", error)
            print("DONE")
        """,
        tmp_path,
    )
    for output in outputs:
        assert "DONE" in output, output
    assert "exists and is not an empty folder" in outputs[0]
    assert "process 0 could not write" in outputs[1]
