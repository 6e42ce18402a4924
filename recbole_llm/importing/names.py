"""Names of columns in public datasets and common exports, in order of preference.

They stand here as :func:`recbole_llm.importing.columns.simple_name` makes them: in lower case, letters and digits only.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


USER_NAMES = _words(
    "userid user uid reviewerid customerid visitorid memberid accountid clientid profileid playerid readerid buyerid "
    "customer visitor username reviewer sessionid session "
    "kundenid kundennr kundennummer kunde nutzerid nutzer benutzerid benutzer clienteid cliente usuarioid usuario "
    "utilisateurid utilisateur пользовательid пользователь клиентid клиент "  # noqa: RUF001
    "用户id 用户 会员id 客户id ユーザーid 顧客id 고객id 사용자id"
)
ITEM_NAMES = _words(
    "itemid item iid parentasin asin productid movieid bookid newsid articleid artistid trackid songid videoid gameid "
    "appid businessid recipeid courseid jobid postid adid contentid isbn sku product movie book news article artist "
    "track song artikelid artikelnr artikelnummer artikel produktid produktnr produktnummer produkt articuloid articulo "
    "productoid producto produtoid produto produitid produit товарid товар "  # noqa: RUF001
    "商品id 商品 物品id 产品id アイテムid 상품id id"
)
# what numbers rows as often as items
WEAK_NAMES = ("id",)
RATING_NAMES = _words(
    "rating ratings overall score stars star ratingvalue reviewrating reviewscore bookrating userrating "
    "bewertung calificación оценка 评分"
)
LABEL_NAMES = _words("label click clicked isclick isclicked liked islike target")
EVENT_NAMES = _words(
    "event eventtype eventname action actiontype behavior behaviour behaviortype interactiontype activity"
)
TIME_NAMES = _words(
    "timestamp time unixreviewtime datetime eventtime eventtimestamp createdat date ts reviewdate ratedat viewedat "
    "purchasedat orderdate ratingtimestamp datum fecha дата 时间 日期 日時"
)
