import sdpo_conformance


def test_the_loss_is_sdpo(tmp_path):
    report = sdpo_conformance.run("swiftsdpo.conformance", profile="quick", out=tmp_path / "conformance")
    assert report.conforming, str(report)
