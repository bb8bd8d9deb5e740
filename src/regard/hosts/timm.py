from regard.core.host import HOSTS, Host
class Timm(Host):
    name="timm"
HOSTS["timm"]=Timm()
