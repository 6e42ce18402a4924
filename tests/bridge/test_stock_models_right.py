"""The stock models that our tables show compute what their papers say: scores from independent formulas, mostly float64.

Known differences from the papers, which are RecBole's choices and stay as they are, stand in benchmarks/results/stock_models.md.
"""

import numpy as np
import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import ModelType, get_model, get_trainer, init_seed
from torch.nn import functional as F

INTER = {"inter": ["user_id", "item_id", "timestamp"]}
TRANSFORMER = dict(n_layers=2, n_heads=2, hidden_size=8, inner_size=16, train_neg_sample_args=None)
MODELS = {
    "Pop": {},
    "EASE": dict(reg_weight=20.0),
    "ItemKNN": dict(k=12, shrink=2.0),
    "ADMMSLIM": dict(lambda1=0.5, lambda2=20.0, alpha=0.75, rho=100.0, k=60),
    "SLIMElastic": dict(alpha=0.02, l1_ratio=0.1),
    "NCEPLRec": dict(rank=45, beta=0.5, reg_weight=2.0),
    "BPR": dict(embedding_size=8),
    "LightGCN": dict(embedding_size=8, n_layers=2),
    "NeuMF": dict(mf_embedding_size=8, mlp_embedding_size=8, mlp_hidden_size=[8, 4], dropout_prob=0.2),
    "DMF": dict(user_embedding_size=8, item_embedding_size=8, user_hidden_size_list=[8], item_hidden_size_list=[8]),
    "SimpleX": dict(embedding_size=8, margin=0.5, negative_weight=10, epochs=30),
    "MultiVAE": dict(mlp_hidden_size=[16], latent_dimension=8, epochs=60),
    "RecVAE": dict(hidden_dimension=16, latent_dimension=8, epochs=30),
    "DiffRec": dict(dims_dnn=[16], embedding_size=6, steps=5, noise_scale=0.1, epochs=60),
    "SASRec": TRANSFORMER,
    "GRU4Rec": dict(embedding_size=8, hidden_size=12, train_neg_sample_args=None),
    "BERT4Rec": TRANSFORMER,
}
SEQUENTIAL = ("SASRec", "GRU4Rec", "BERT4Rec")


class Trained:
    """A model after some epochs on the made data, as the best checkpoint has it."""

    def __init__(self, name, folder, data, **more):
        given = dict(epochs=12, learning_rate=0.01, train_batch_size=128, stopping_step=60) | MODELS[name] | more
        given |= dict(data_path=str(data), checkpoint_dir=str(folder), gpu_id="", show_progress=False, state="ERROR")
        given |= dict(metrics=["NDCG"], topk=[10], valid_metric="NDCG@10", load_col=INTER)
        if name in SEQUENTIAL:
            given["MAX_ITEM_LIST_LENGTH"] = 8  # shorter than a history, and longer than the first prefixes
        self.config = Config(name, "toy", config_dict=given)
        init_seed(self.config["seed"], True)
        self.train, self.valid, self.test = data_preparation(self.config, create_dataset(self.config))
        self.model = get_model(name)(self.config, self.train._dataset)
        self.trainer = get_trainer(self.config["MODEL_TYPE"], name)(self.config, self.model)
        self.best = self.trainer.fit(self.train, self.valid, verbose=False)[1]
        self.model.eval()
        self.last_scores = self.scores()
        self.again = self.trainer.evaluate(self.valid, load_best_model=True)
        self.weight = {key: value.double() for key, value in self.model.state_dict().items()}

    @property
    def matrix(self):
        """Interactions of the training split, ``[users, items]`` float64, padding included."""
        inter = self.train._dataset.inter_feat
        found = np.zeros((self.train._dataset.user_num, self.train._dataset.item_num))
        np.add.at(found, (inter["user_id"].numpy(), inter["item_id"].numpy()), 1.0)
        return found

    @torch.no_grad()
    def scores(self, rows=None):
        """Scores of every item, ``[rows, items]``, for all prefixes of a sequential model, else for users."""
        batch, items = self.rows(rows), self.train._dataset.item_num
        users = len(batch["user_id"])
        try:
            scores = self.model.full_sort_predict(batch)
        except NotImplementedError:  # as in Trainer._full_sort_batch_eval
            pairs = {"user_id": batch["user_id"].repeat_interleave(items), "item_id": torch.arange(items).repeat(users)}
            scores = self.model.predict(pairs)
        return torch.as_tensor(scores).view(users, items)

    def rows(self, rows=None):
        if self.config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            inter = self.train._dataset.inter_feat
            return inter if rows is None else inter[rows]
        users = torch.arange(1, self.train._dataset.user_num)
        return {"user_id": users if rows is None else users[rows]}

    def linear(self, name, x):
        bias = self.weight.get(f"{name}.bias")
        return x @ self.weight[f"{name}.weight"].T + (0.0 if bias is None else bias)


@pytest.fixture(scope="module")
def of(tmp_path_factory, toy_path):
    """Trained models by name, each trained once."""
    folder, made = tmp_path_factory.mktemp("saved"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # RecBole writes its logs where it runs

        def get(name):
            if name not in made:
                made[name] = Trained(name, folder, toy_path)
            return made[name]

        yield get


# ---------------------------------------------------------------- what holds for all of them


@pytest.mark.parametrize("name", MODELS)
def test_the_best_state_is_the_one_that_is_tested(of, name):
    trained = of(name)
    assert trained.again == trained.best


@pytest.mark.parametrize("name", MODELS)
def test_scores_depend_on_neither_chance_nor_the_batch(of, name):
    trained = of(name)
    loose = dict(atol=2e-5 if name == "ADMMSLIM" else 1e-6, rtol=1e-5)  # it adds noise of 1e-5
    scores = trained.scores()
    torch.testing.assert_close(trained.scores(), scores, **loose)
    some = torch.tensor([7, 0, 3])
    torch.testing.assert_close(trained.scores(some), scores[some], **loose)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_scores_of_pairs_are_those_of_the_ranking(of, name):
    trained = of(name)
    scores, item = trained.scores(), trained.train._dataset.iid_field
    for wanted in (1, 17, scores.size(1) - 1):
        batch = dict(trained.rows().interaction if name in SEQUENTIAL else trained.rows())
        batch[item] = torch.full_like(batch["user_id"], wanted)
        pairs = torch.as_tensor(trained.model.predict(batch)).double()
        torch.testing.assert_close(pairs, scores[:, wanted].double(), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("Pop", *SEQUENTIAL)])
def test_training_raises_what_users_interacted_with(of, name):
    trained = of(name)
    scores, seen = trained.last_scores[:, 1:].double().numpy(), trained.matrix[1:, 1:] > 0
    above = [(row[own][:, None] > row[~own]).mean() for row, own in zip(scores, seen, strict=True)]
    assert np.mean(above) > 0.6  # a half by chance, or less if negatives were taken for positives


# ---------------------------------------------------------------- closed forms


def test_pop_is_the_number_of_interactions(of, toy_path, tmp_path, monkeypatch):
    trained = of("Pop")
    count = trained.matrix.sum(0)
    scores = trained.scores().numpy()
    np.testing.assert_allclose(scores, np.broadcast_to(count / count.max(), scores.shape), rtol=1e-12)
    # the size of a batch and the drawn negatives have no say
    monkeypatch.chdir(tmp_path)
    few = Trained("Pop", tmp_path, toy_path, train_neg_sample_args={"distribution": "uniform", "sample_num": 3})
    assert few.model.item_cnt.tolist() == trained.model.item_cnt.tolist()
    assert few.again == trained.again


def ease(matrix, ridge):
    inverse = np.linalg.inv(matrix.T @ matrix + ridge * np.eye(matrix.shape[1]))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights


def test_ease_is_the_closed_form(of):
    trained = of("EASE")
    expected = trained.matrix @ ease(trained.matrix, 20.0)
    np.testing.assert_allclose(trained.scores().numpy(), expected[1:], atol=1e-5)


def test_itemknn_sums_the_cosines_of_the_nearest(of):
    trained = of("ItemKNN")
    x, found = trained.matrix, trained.model.w.toarray()
    norm = np.sqrt((x**2).sum(0))
    cosine = x.T @ x / (np.outer(norm, norm) + 2.0 + 1e-6)
    np.fill_diagonal(cosine, 0.0)
    kept = found != 0
    np.testing.assert_allclose(found[kept], cosine[kept], rtol=1e-5)
    # which of equally near items are kept is left open
    np.testing.assert_allclose(np.sort(found, axis=0)[-12:], np.sort(cosine, axis=0)[-12:], atol=1e-6)
    np.testing.assert_allclose(trained.scores().numpy(), (x @ found)[1:], atol=1e-5)


def admm_slim(x, lambda1, lambda2, alpha, rho, steps):
    """Algorithm 1 of Steck et al. (WSDM 2020) with non-negative weights, in float64."""
    gram = x.T @ x
    inverse = np.linalg.inv(gram + np.diag(lambda2 * x.mean(0) ** alpha) + rho * np.eye(x.shape[1]))
    start, sparse, dual = inverse @ gram, np.zeros_like(gram), np.zeros_like(gram)
    for _ in range(steps):
        dense = start + inverse @ (rho * sparse - dual)
        dense -= inverse * (np.diag(dense) / np.diag(inverse))
        sparse = np.maximum(dense + (dual - lambda1) / rho, 0.0)
        dual += rho * (dense - sparse)
    return sparse


def test_admmslim_is_its_algorithm(of):
    trained = of("ADMMSLIM")
    weights = admm_slim(trained.matrix, 0.5, 20.0, 0.75, 100.0, 60)
    np.testing.assert_allclose(trained.model.item_similarity, weights, atol=1e-5)
    assert 0.02 < (weights > 0).mean() < 0.9 and np.abs(np.diag(weights)).max() < 1e-3
    np.testing.assert_allclose(trained.scores().numpy(), (trained.matrix @ weights)[1:], atol=1e-4)


def test_slimelastic_solves_its_elastic_net(of):
    trained = of("SLIMElastic")
    x, weights = trained.matrix, trained.model.item_similarity.toarray().astype(np.float64)
    assert np.abs(np.diag(weights)).max() == 0 and weights.min() == 0
    # Karush, Kuhn and Tucker: of |x_j - X w|^2 / 2n + alpha l1 |w| + alpha (1 - l1) |w|^2 / 2 over w >= 0, w_j = 0
    slope = x.T @ (x @ weights - x) / len(x) + 0.02 * 0.1 + 0.02 * 0.9 * weights
    np.fill_diagonal(slope, 0.0)
    tolerance = 0.02 * 0.02 * 0.1
    assert np.abs(slope[weights > 0]).max() < tolerance
    assert slope[weights == 0].min() > -tolerance
    np.testing.assert_allclose(trained.scores().numpy(), (x @ weights)[1:], atol=1e-6)


def test_nceplrec_projects_on_weighted_singular_vectors(of):
    trained = of("NCEPLRec")
    x = trained.matrix
    with np.errstate(divide="ignore"):
        weight = np.maximum(np.log(len(x) / x.sum(0) ** 0.5), 0.0)
    _, values, vectors = np.linalg.svd(np.where(x > 0, weight, 0.0), full_matrices=False)
    users = x @ (vectors[:45].T * np.sqrt(values[:45]))
    expected = users @ np.linalg.solve(users.T @ users + 2.0 * np.eye(45), users.T @ x)
    np.testing.assert_allclose(trained.scores().numpy(), expected[1:], atol=1e-3)


# ---------------------------------------------------------------- learned models


def test_bpr_is_a_dot_product_learned_on_pairs(of):
    trained = of("BPR")
    user, item = trained.weight["user_embedding.weight"], trained.weight["item_embedding.weight"]
    torch.testing.assert_close(trained.scores().double(), (user @ item.T)[1:], atol=1e-5, rtol=1e-5)
    batch = {"user_id": torch.tensor([1, 2]), "item_id": torch.tensor([3, 4]), "neg_item_id": torch.tensor([5, 6])}
    gap = (user[[1, 2]] * (item[[3, 4]] - item[[5, 6]])).sum(1)
    loss = trained.model.calculate_loss(batch).detach().double()
    torch.testing.assert_close(loss, -F.logsigmoid(gap).mean(), atol=1e-6, rtol=1e-5)


def test_lightgcn_averages_normalised_propagations(of):
    trained = of("LightGCN")
    x = torch.from_numpy(trained.matrix)
    users, items = x.shape
    graph = torch.zeros(users + items, users + items, dtype=torch.float64)
    graph[:users, users:], graph[users:, :users] = x, x.T
    degree = graph.sum(1)
    scale = torch.where(degree > 0, degree.clamp(min=1) ** -0.5, 0.0)
    graph = scale[:, None] * graph * scale
    layer = torch.cat([trained.weight["user_embedding.weight"], trained.weight["item_embedding.weight"]])
    layers = [layer, graph @ layer, graph @ graph @ layer]
    user, item = torch.stack(layers).mean(0).split([users, items])
    torch.testing.assert_close(trained.scores().double(), (user @ item.T)[1:], atol=1e-5, rtol=1e-4)


def test_neumf_joins_a_product_and_a_perceptron(of):
    trained = of("NeuMF")
    weight = trained.weight
    user, item = (weight[f"{side}_mlp_embedding.weight"] for side in ("user", "item"))
    pairs = torch.cat([user[1:, None].expand(-1, len(item), -1), item[None].expand(len(user) - 1, -1, -1)], dim=-1)
    for layer in (1, 4):  # dropout, linear, ReLU; twice
        pairs = trained.linear(f"mlp_layers.mlp_layers.{layer}", pairs).relu()
    product = weight["user_mf_embedding.weight"][1:, None] * weight["item_mf_embedding.weight"]
    expected = trained.linear("predict_layer", torch.cat([product, pairs], dim=-1)).squeeze(-1).sigmoid()
    torch.testing.assert_close(trained.scores().double(), expected, atol=1e-6, rtol=1e-5)


def test_dmf_multiplies_what_two_networks_make_of_rows_and_columns(of):
    trained = of("DMF")
    x = torch.from_numpy(trained.matrix)
    user = trained.linear("user_fc_layers.mlp_layers.1", trained.linear("user_linear", x)).relu()
    item = trained.linear("item_fc_layers.mlp_layers.1", trained.linear("item_linear", x.T)).relu()
    expected = (user @ item.T).sigmoid()[1:]
    torch.testing.assert_close(trained.scores().double(), expected, atol=1e-5, rtol=1e-4)


def test_simplex_is_the_cosine_of_user_with_history_and_item(of):
    trained = of("SimpleX")
    x = torch.from_numpy(trained.matrix)
    user, item = trained.weight["user_emb.weight"], trained.weight["item_emb.weight"]
    mean = x @ item / x.sum(1, keepdim=True).clamp(min=1)
    joined = F.normalize(0.5 * user + 0.5 * trained.linear("UI_map", mean), dim=1)
    expected = (joined @ F.normalize(item, dim=1).T)[1:]
    torch.testing.assert_close(trained.scores().double(), expected, atol=1e-5, rtol=1e-4)


def test_multivae_decodes_the_mean(of):
    trained = of("MultiVAE")
    h = F.normalize(torch.from_numpy(trained.matrix))
    h = trained.linear("encoder.2", trained.linear("encoder.0", h).tanh())[:, :4]
    expected = trained.linear("decoder.2", trained.linear("decoder.0", h).tanh())[1:]
    torch.testing.assert_close(trained.scores().double(), expected, atol=1e-5, rtol=1e-4)


def test_recvae_decodes_the_mean_of_its_dense_encoder(of):
    trained = of("RecVAE")
    x, hidden = F.normalize(torch.from_numpy(trained.matrix)), []
    for layer in range(1, 6):
        before = trained.linear(f"encoder.fc{layer}", hidden[-1] if hidden else x)
        scale, shift = trained.weight[f"encoder.ln{layer}.weight"], trained.weight[f"encoder.ln{layer}.bias"]
        hidden.append(F.layer_norm(F.silu(before + sum(hidden)), (16,), scale, shift, 0.1))
    expected = trained.linear("decoder", trained.linear("encoder.fc_mu", hidden[-1]))[1:]
    torch.testing.assert_close(trained.scores().double(), expected, atol=1e-5, rtol=1e-4)


def test_diffrec_walks_back_along_the_means(of):
    trained = of("DiffRec")
    beta = torch.linspace(0.1 * 0.0005, 0.1 * 0.005, 5, dtype=torch.float64)
    beta[0] = 1e-5
    kept = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    x = torch.from_numpy(trained.matrix)
    for t in reversed(range(5)):
        angle = t * torch.exp(-np.log(10000.0) * torch.arange(3) / 3).double()
        time = trained.linear("mlp.emb_layer", torch.cat([angle.cos(), angle.sin()]).expand(len(x), -1))
        hidden = trained.linear("mlp.mlp_layers.mlp_layers.1", torch.cat([x, time], dim=1)).tanh()
        guess = trained.linear("mlp.mlp_layers.mlp_layers.4", hidden)
        of_guess = beta[t] * before[t].sqrt() / (1 - kept[t])
        of_x = (1 - before[t]) * (1 - beta[t]).sqrt() / (1 - kept[t])
        x = of_guess * guess + of_x * x
    torch.testing.assert_close(trained.scores().double(), x[1:], atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------- sequential models


def test_gru4rec_is_a_gated_recurrent_unit(of):
    trained = of("GRU4Rec")
    rows = trained.rows()
    item = trained.weight["item_embedding.weight"]
    from_input, from_state = trained.weight["gru_layers.weight_ih_l0"], trained.weight["gru_layers.weight_hh_l0"]
    lengths, states = rows["item_length"], torch.zeros(len(rows), 12, dtype=torch.float64)
    for t in range(rows["item_id_list"].size(1)):
        x, h = (item[rows["item_id_list"][:, t]] @ from_input.T).chunk(3, 1), (states @ from_state.T).chunk(3, 1)
        reset, update = (x[0] + h[0]).sigmoid(), (x[1] + h[1]).sigmoid()
        new = (1 - update) * (x[2] + reset * h[2]).tanh() + update * states
        states = torch.where((t < lengths)[:, None], new, states)
    expected = trained.linear("dense", states) @ item.T
    assert {1, 8} <= set(lengths.tolist())
    torch.testing.assert_close(trained.scores().double(), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def transformer(trained, x, **masks):
    """PyTorch's own encoder with the trained weights, in float64."""
    norm = lambda name, x: F.layer_norm(x, (8,), weight[f"{name}.weight"], weight[f"{name}.bias"], 1e-12)  # noqa: E731
    weight = trained.weight
    x = norm("LayerNorm", x)
    for number in range(2):
        layer = torch.nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True, dtype=torch.float64
        )
        own = {k.split(f"layer.{number}.")[1]: v for k, v in weight.items() if f"layer.{number}." in k}
        attention, feed = "multi_head_attention", "feed_forward"
        given = {}
        for kind in ("weight", "bias"):
            given[f"self_attn.in_proj_{kind}"] = torch.cat(
                [own[f"{attention}.{name}.{kind}"] for name in ("query", "key", "value")]
            )
            given[f"self_attn.out_proj.{kind}"] = own[f"{attention}.dense.{kind}"]
            given[f"norm1.{kind}"], given[f"norm2.{kind}"] = (
                own[f"{name}.LayerNorm.{kind}"] for name in (attention, feed)
            )
            given[f"linear1.{kind}"], given[f"linear2.{kind}"] = (own[f"{feed}.dense_{n}.{kind}"] for n in (1, 2))
        layer.load_state_dict(given)
        x = layer(x, **masks)
    return x


def test_sasrec_is_a_causal_transformer_over_items_and_places(of):
    trained = of("SASRec")
    rows = trained.rows()
    item, length = trained.weight["item_embedding.weight"], rows["item_length"].long()
    causal = torch.ones(8, 8, dtype=torch.bool).triu(1)
    states = transformer(
        trained, item[rows["item_id_list"]] + trained.weight["position_embedding.weight"], src_mask=causal
    )
    expected = states[torch.arange(len(length)), length - 1] @ item.T
    assert {1, 8} <= set(length.tolist())
    torch.testing.assert_close(trained.scores().double(), expected, atol=1e-4, rtol=1e-4)


def test_bert4rec_predicts_a_mask_after_the_newest_items(of):
    trained = of("BERT4Rec")
    rows = trained.rows()
    item, length = trained.weight["item_embedding.weight"], rows["item_length"].long()
    sequences = torch.zeros(len(length), 8, dtype=torch.int64)
    for sequence, own, n in zip(sequences, rows["item_id_list"], length.tolist(), strict=True):
        newest = own[:n][-7:]  # there are eight places, and one is the mask's
        sequence[: len(newest)], sequence[len(newest)] = newest, trained.model.n_items
    states = transformer(
        trained,
        item[sequences] + trained.weight["position_embedding.weight"],
        src_key_padding_mask=sequences == 0,
    )
    states = states[torch.arange(len(length)), length.clamp(max=7)]
    states = F.gelu(trained.linear("output_ffn", states))
    states = F.layer_norm(states, (8,), trained.weight["output_ln.weight"], trained.weight["output_ln.bias"], 1e-12)
    expected = states @ item[:-1].T + trained.weight["output_bias"]
    assert {1, 8} <= set(length.tolist())
    torch.testing.assert_close(trained.scores().double(), expected, atol=1e-4, rtol=1e-4)
